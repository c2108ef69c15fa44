"""Runs: the current one, script runs that end with their process, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from openweights import InvalidInputError, NotFoundError, OpenWeights
from openweights.types import Claim
from tests.client.conftest import QuietClient, append
from tests.client.kinds import Echo

REPOSITORY = Path(__file__).parents[2]


def test_run_of_a_job(ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path) -> None:
    job = Echo(ow).create(text="a")
    claimed = claim().run
    inside = OpenWeights(settings=replace(ow.settings, run_id=claimed.id))
    run = inside.run
    assert run is inside.run
    assert (run.id, run.job_id, run.attempt, run["status"]) == (
        claimed.id,
        job.id,
        1,
        "in_progress",
    )
    run.log({"step": 1, "loss": 0.5})
    run.log({"type": "picture"}, file=BytesIO(b"pixels"))
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    run.log({"path": "notes.txt"}, file=path)
    assert run.flush()
    first, second, third = [event.data for event in run.events]
    assert first == {"step": 1, "loss": 0.5}
    assert ow.files.content(second["file"]) == b"pixels"
    assert second["file"].startswith("event:file-")
    assert ow.files.content(third["file"]) == b"notes"
    ow.backend.append_log(run.id, 0, "ž out\n".encode())
    assert run.logs() == "ž out\n"
    assert run.update("completed").status == "completed"
    assert job.refresh().outputs == {"step": 1, "loss": 0.5, "type": "picture", **third}
    assert repr(run) == f"Run({run.id}, completed)"
    with pytest.raises(AttributeError):
        _ = run.nonsense
    with pytest.raises(KeyError):
        _ = run["log"]
    inside.close()


def test_collection(ow: QuietClient, claim: Callable[[], Claim]) -> None:
    job = Echo(ow).create(text="a")
    for _ in range(3):
        run = claim().run
        ow.backend.release_run(run.id, run.attempt, reason="test")
    last = claim().run
    assert [run.attempt for run in job.runs] == [1, 2, 3, 4]
    assert [run.attempt for run in ow.runs.list(job_id=job.id, limit=2)] == [3, 4]
    assert [run.id for run in ow.runs.list(status="in_progress")] == [last.id]
    assert [run.id for run in ow.runs.list(worker_id=last.worker_id)] == [last.id]
    assert ow.runs.retrieve(last.id).refresh().error is None
    with pytest.raises(NotFoundError):
        ow.runs.retrieve(9999)


def _script(code: str, *arguments: str) -> int:
    code = "from openweights import OpenWeights\now = OpenWeights()\n" + code
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, check=False, capture_output=True).returncode


def test_script_run_ends_with_its_process(ow: QuietClient) -> None:
    assert _script("ow.run.log({'n': 1})", "--lr", "1 e") == 0
    (job,) = ow.jobs.list()
    assert job.id.startswith("sjob-") and job.type == "script" and job.status == "completed"
    assert job.script.endswith("--lr '1 e'") and str(REPOSITORY) not in job.script
    assert job.outputs == {"n": 1}
    assert _script("ow.run.log({'n': 2})\nraise ValueError('no such luck')") == 1
    failed = ow.jobs.list(limit=1)[0]
    assert failed.status == "failed"
    assert failed.runs[0].error == "ValueError: no such luck"
    assert failed.outputs == {"n": 2}
    # Ended by hand.
    assert _script("ow.run.log({'n': 3})\now.run.update('failed', error='by hand')") == 0
    assert ow.jobs.list(limit=1)[0].runs[0].error == "by hand"
    # Using the client without `ow.run` makes no run.
    assert _script("ow.jobs.list()") == 0
    assert len(ow.jobs.list()) == 3


def _result(ow: QuietClient, content: bytes, path: Any) -> dict[str, Any]:
    return {"path": path, "file": ow.files.create(content, "result")["id"]}


def test_download(ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path) -> None:
    job = Echo(ow).create(text="a")
    first = claim().run
    ow.backend.append_log(first.id, 0, b"first\n")
    append(
        ow.backend, first.id, _result(ow, b"old", "model/a.bin"), _result(ow, b"b", "only/b.txt")
    )
    ow.backend.release_run(first.id, first.attempt, reason="test")
    second = claim().run
    ow.backend.append_log(second.id, 0, b"second\n")
    gone = _result(ow, b"gone", "gone.txt")
    append(
        ow.backend,
        second.id,
        _result(ow, b"newer", "model/a.bin"),
        _result(ow, b"newest", "./model/../model/a.bin"),
        {"type": "checkpoint", "step": 3, "file": "checkpoint:file-000000000000"},
        gone,
    )
    ow.files.delete(gone["file"])

    def content(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    written = job.download(tmp_path / "last")
    assert content(tmp_path / "last") == {
        "model/a.bin": b"newest",
        f"{second.id}.log": b"second\n",
    }
    assert {path.name for path in written} == {"a.bin", f"{second.id}.log"}
    job.download(str(tmp_path / "all"), only_last_run=False)
    assert content(tmp_path / "all") == {
        "model/a.bin": b"newest",
        "only/b.txt": b"b",
        f"{first.id}.log": b"first\n",
        f"{second.id}.log": b"second\n",
    }
    job.runs[0].download(tmp_path / "first")
    assert content(tmp_path / "first")["model/a.bin"] == b"old"


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "link/x", "", ".", "a\0b"])
def test_result_paths_that_leave_the_folder(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path, path: str
) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    append(ow.backend, run.id, _result(ow, b"good", "good.txt"), _result(ow, b"evil", path))
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "outside").mkdir()
    (target / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInputError, match="which leaves .*target"):
        job.download(target)
    assert [entry.name for entry in target.iterdir()] == ["link"]
    assert list((tmp_path / "outside").iterdir()) == []
