"""Runs: the current one, script runs that end with their process, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from openweights import InvalidInputError, InvalidStateError, NotFoundError, OpenWeights
from openweights.client.runs import Run
from openweights.types import Claim
from tests.client.conftest import QuietClient, append
from tests.client.kinds import Echo
from tests.waiting import HANGS_S

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
    before = ow.files.list()
    with pytest.raises(InvalidInputError, match="'bad' is a object"):
        run.log({"bad": object()}, file=BytesIO(b"of an event that is refused"))
    assert ow.files.list() == before
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
    return _process(code, *arguments).returncode


def _process(code: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    code = "from openweights import OpenWeights\now = OpenWeights()\n" + code
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, check=False, capture_output=True)


def test_script_run_ends_with_its_process(ow: QuietClient) -> None:
    assert _script("ow.run.log({'n': 1})", "--key", "sk-123") == 0
    (job,) = ow.jobs.list()
    assert job.id.startswith("sjob-") and job.type == "script" and job.status == "completed"
    # An argument may be a secret, and the path is nobody's business.
    assert job.script == "-c"
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


# What forked children do; and whether the parent has begun the run by then.
CHILDREN = {
    # A pool kills its processes when it is left.
    "pool": ("ow.run\nwith forks.Pool(2) as pool:\n    pool.map(log, range(20))", 20),
    "process": ("ow.run\np = forks.Process(target=log, args=(0,))\np.start()\np.join()", 1),
    "alone": ("p = forks.Process(target=log, args=(0,))\np.start()\np.join()", 1),
    "exit": (
        "ow.run.log({'n': 1})\nchild = os.fork()\nif not child:\n    log(0)\n    os._exit(0)\n"
        "os.waitpid(child, 0)",
        2,
    ),
}


@pytest.mark.parametrize("kind", CHILDREN)
def test_forked_children_of_a_script_lose_nothing(
    ow: QuietClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, count = CHILDREN[kind]
    head = "import multiprocessing, os\nforks = multiprocessing.get_context('fork')\n"
    done = _process(f"{head}def log(n):\n    ow.run.log({{'n': n}})\n{code}")
    assert done.returncode == 0, done.stderr
    (job,) = ow.jobs.list()
    assert sorted(event.data["n"] for event in job.events()) == list(range(count))
    assert job.status == "completed"
    assert list(tmp_path.glob("openweights-spool-*")) == []


def test_a_forked_child_does_not_wait_for_what_its_parent_sends(
    ow: QuietClient, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
run = ow.run
run.log({"n": 1})
sender = run._sender
sender._lock.acquire()  # as a thread of the parent may at that moment
child = os.fork()
if not child:
    signal.alarm(240)
    os._exit(0 if run.flush(9999) and not sender.flush(9999) and not sender.close(9999) else 1)
sender._lock.release()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    begun = time.monotonic()
    done = _process(code)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < HANGS_S


@pytest.mark.parametrize(
    ("code", "returncode", "error"),
    [
        ("import sys; sys.exit(3)", 3, "SystemExit: 3"),
        ("import sys; sys.exit('no rows')", 1, "SystemExit: no rows"),
        ("import argparse; argparse.ArgumentParser().parse_args(['x'])", 2, "SystemExit: 2"),
        ("import sys\nwith open('/dev/null'):\n    sys.exit(4)", 4, "SystemExit: 4"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
        ("import sys; sys.exit()", 0, None),
        ("import sys; sys.exit(0)", 0, None),
        ("import sys\ntry:\n    sys.exit(3)\nexcept SystemExit:\n    ow.run.log({})", 0, None),
        ("import sys\ntry:\n    sys.exit(3)\nexcept SystemExit:\n    raise", 3, "SystemExit: 3"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass", 0, None),
        # One that a thread, or a session before the run, has ended with is not the program's.
        (
            "import sys, threading\nthread = threading.Thread(target=sys.exit, args=(3,))\n"
            "thread.start()\nthread.join()",
            0,
            None,
        ),
        ("import sys\nsys.last_value = ValueError('of before')", 0, None),
    ],
)
def test_how_a_script_ends(ow: QuietClient, code: str, returncode: int, error: str | None) -> None:
    assert _script(f"ow.run.log({{'n': 1}})\n{code}") == returncode
    (job,) = ow.jobs.list()
    assert job.status == ("completed" if error is None else "failed")
    assert job.runs[0].error == error


def test_hooks_of_others_go_on(ow: QuietClient) -> None:
    code = """
import sys
def mine(kind, error, traceback):
    sys.stdout.write(f"mine: {error}")
sys.excepthook = mine
ow.run.log({'n': 1})
raise ValueError('twice told')
"""
    ended = _process(code)
    assert (ended.returncode, ended.stdout) == (1, b"mine: twice told")
    assert ow.jobs.list()[0].runs[0].error == "ValueError: twice told"


def test_logging_goes_on_after_a_close(ow: QuietClient, claim: Callable[[], Claim]) -> None:
    Echo(ow).create(text="a")
    run = OpenWeights(settings=replace(ow.settings, run_id=claim().run.id)).run

    def log(thread: int) -> None:
        for number in range(100):
            run.log({"n": [thread, number]})

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        run.close()
    run.close()
    found = [event.data["n"] for event in run.events]
    assert sorted(found) == [[thread, number] for thread in range(4) for number in range(100)]


def test_threads_share_a_sender_from_the_first_event_on(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path
) -> None:
    Echo(ow).create(text="a")
    settings = replace(ow.settings, run_id=claim().run.id, spool_dir=tmp_path / "spool")
    for _ in range(20):
        run = OpenWeights(settings=settings).run
        start = threading.Barrier(8)

        def log(run: Run = run, start: threading.Barrier = start) -> None:
            start.wait()
            run.log({"n": 1})

        threads = [threading.Thread(target=log) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.close()
        # A second sender's spool would still be there: nobody has closed it.
        assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 250 + ".bin", "ž" * 127])
def test_results_with_long_names(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path, name: str
) -> None:
    job = Echo(ow).create(text="a")
    append(ow.backend, claim().run.id, _result(ow, b"long", name))
    job.download(tmp_path)
    assert (tmp_path / name).read_bytes() == b"long"


def test_results_that_cannot_be_written(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path
) -> None:
    job = Echo(ow).create(text="a")
    append(ow.backend, claim().run.id, _result(ow, b"long", "x" * 300))
    with pytest.raises(InvalidInputError, match="cannot write .*: File name too long"):
        job.download(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="cannot write .*file"):
        job.runs[0].download(tmp_path / "file")


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
        "log.txt": b"second\n",
    }
    assert {path.name for path in written} == {"a.bin", "log.txt"}
    job.download(str(tmp_path / "all"), only_last_run=False)
    assert content(tmp_path / "all") == {
        "model/a.bin": b"newest",
        "only/b.txt": b"b",
        "log-attempt-1.txt": b"first\n",
        "log.txt": b"second\n",
    }
    job.runs[0].download(tmp_path / "first")
    first_alone = content(tmp_path / "first")
    assert first_alone["model/a.bin"] == b"old"
    assert first_alone["log-attempt-1.txt"] == b"first\n" and "log.txt" not in first_alone
    job.runs[1].download(tmp_path / "second")
    assert content(tmp_path / "second")["log.txt"] == b"second\n"


def test_a_job_that_writes_the_name_of_our_log_keeps_its_own(
    ow: QuietClient, claim: Callable[[], Claim], tmp_path: Path
) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    append(ow.backend, run.id, _result(ow, b"own", "log.txt"))
    job.download(tmp_path)
    assert (tmp_path / "log.txt").read_bytes() == b"own"
    assert (tmp_path / "log-attempt-1.txt").is_file()
    append(ow.backend, run.id, _result(ow, b"own, too", "log-attempt-1.txt"))
    job.download(tmp_path)
    assert (tmp_path / "log-attempt-1.txt").read_bytes() == b"own, too"


@pytest.mark.parametrize("where", ["relative", "absolute", "link"])
def test_a_job_that_writes_the_name_of_our_table_keeps_its_own(
    ow: QuietClient,
    claim: Callable[[], Claim],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    job = Echo(ow).create(text="a")
    append(ow.backend, claim().run.id, {"step": 1, "loss": 2.0}, _result(ow, b"o", "metrics.jsonl"))
    target = {"relative": Path("out"), "absolute": tmp_path / "out", "link": tmp_path / "link"}
    written = job.download(target[where])
    # As it was given, whatever it is: nobody has to tell two ways of writing a path apart.
    assert [path.parent for path in written] == [target[where]] * 2
    assert (target[where] / "metrics.jsonl").read_bytes() == b"o"


def test_a_job_that_has_not_run_has_nothing_to_download(ow: QuietClient, tmp_path: Path) -> None:
    job = Echo(ow).create(text="a")
    with pytest.raises(InvalidStateError, match=f"job {job.id} has not run, .*; it is pending"):
        job.download(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "link/x", "", "."])
def test_result_paths_that_leave_the_folder(
    ow: QuietClient, store: str, claim: Callable[[], Claim], tmp_path: Path, path: str
) -> None:
    if store == "supabase" and "\0" in path:
        pytest.skip("PostgreSQL holds no NUL: another character is stored in its place")
    job = Echo(ow).create(text="a")
    run = claim().run
    append(ow.backend, run.id, _result(ow, b"good", "good.txt"), _result(ow, b"evil", path))
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "outside").mkdir()
    (target / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInputError, match="leaves .*target"):
        job.download(target)
    assert [entry.name for entry in target.iterdir()] == ["link"]
    assert list((tmp_path / "outside").iterdir()) == []
