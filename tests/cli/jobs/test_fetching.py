"""`ow logs` and `ow fetch`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.cli.jobs.logs import start_of_tail
from tests.cli.conftest import Ow, claim, log_events, submit

BINARY = bytes(range(256)) * 100


def test_logs_are_printed_byte_for_byte_while_the_job_runs(ow: Ow, backend: Backend) -> None:
    run = claim(backend, "ftjob-running").run
    backend.append_log(run.id, 0, b"step 1\r\xff\xc3")
    backend.append_log(run.id, 9, b"\xa9 no end of line")
    answer = ow("logs", "ftjob-r")
    assert answer.exit_code == 0
    assert answer.stdout_bytes == b"step 1\r\xff\xc3\xa9 no end of line"
    assert ow("logs", "ftjob-r", "--run-id", str(run.id)).stdout_bytes == answer.stdout_bytes
    assert ow("logs", "ftjob-r", "--run-id", "999").exit_code == 1


def test_logs_of_several_runs_and_of_none(ow: Ow, backend: Backend) -> None:
    run = claim(backend, "ftjob-twice").run
    backend.append_log(run.id, 0, b"first\n")
    backend.finish_run(run.id, run.attempt, "failed", error="boom")
    backend.restart_job("ftjob-twice")
    second = backend.claim_job("worker-of-ftjob-twice")
    assert second is not None
    backend.append_log(second.run.id, 0, b"second\n")
    assert ow("logs", "ftjob-twice").stdout == "second\n"
    assert ow("logs", "ftjob-twice", "--run-id", str(run.id)).stdout == "first\n"

    submit(backend, "ftjob-new")
    answer = ow("logs", "ftjob-new")
    assert answer.exit_code == 0
    assert answer.stdout == ""
    assert answer.stderr == "ow: job ftjob-new is pending and has not run yet: there is no log\n"


@pytest.mark.parametrize(
    ("log", "count", "shown"),
    [
        (b"", 3, ""),
        (b"one\ntwo\nthree\n", 2, "two\nthree\n"),
        (b"one\ntwo\nthr", 2, "two\nthr"),
        (b"one\n\n\n", 2, "\n\n"),
        (b"one\ntwo\n", 5, "one\ntwo\n"),
        (b"one\ntwo\n", 0, ""),
        (b"one\ntwo", 1, "two"),
        (b"no end", 1, "no end"),
        ("eins\nzwölf\n".encode(), 1, "zwölf\n"),
        (b"\r10%\r20%\nend\n", 1, "end\n"),
    ],
)
def test_the_last_lines_of_a_log(
    ow: Ow, backend: Backend, log: bytes, count: int, shown: str
) -> None:
    run = claim(backend, "ftjob-long").run
    backend.append_log(run.id, 0, log)
    assert ow("logs", "ftjob-long", "-n", str(count)).stdout == shown
    backend.finish_run(run.id, run.attempt, "completed")
    assert ow("logs", "-f", "--tail", str(count), "ftjob-long").stdout == shown
    # In pieces, wherever they are cut.
    pieces = [log[i : i + 1] for i in range(len(log))]
    assert log[start_of_tail(pieces, count) :].decode() == shown


def test_follow_ends_with_the_job(ow: Ow, backend: Backend) -> None:
    run = claim(backend, "ftjob-done").run
    backend.append_log(run.id, 0, b"all of it\n")
    backend.finish_run(run.id, run.attempt, "completed")
    answer = ow("logs", "-f", "ftjob-done")
    assert (answer.exit_code, answer.stdout) == (0, "all of it\n")


def test_fetch_a_file(ow: Ow, backend: Backend, tmp_path: Path) -> None:
    file = backend.put_file(io.BytesIO(BINARY), "result", "weights.bin")
    assert ow("fetch", file.id).stdout_bytes == BINARY
    target = tmp_path / "new" / "here.bin"
    answer = ow("fetch", file.id, "-o", str(target))
    assert answer.exit_code == 0, answer.output
    assert target.read_bytes() == BINARY
    assert ow("fetch", file.id, "-o", str(tmp_path)).exit_code == 0
    assert (tmp_path / "weights.bin").read_bytes() == BINARY
    assert [path.name for path in target.parent.iterdir()] == ["here.bin"]


def test_fetch_the_results_of_a_job(
    ow: Ow, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = claim(backend, "ftjob-done").run
    file = backend.put_file(io.BytesIO(BINARY), "result", "x.bin")
    log_events(backend, run.id, {"file": file.id, "path": "adapter/x.bin"})
    backend.append_log(run.id, 0, b"log\n")
    backend.finish_run(run.id, run.attempt, "completed")

    monkeypatch.chdir(tmp_path)
    answer = ow("fetch", "ftjob-d")
    assert answer.exit_code == 0, answer.output
    printed = {Path(line) for line in answer.stdout.splitlines()}
    assert Path("ftjob-done/adapter/x.bin") in printed
    assert all(path.is_file() for path in printed)
    assert (tmp_path / "ftjob-done" / "adapter" / "x.bin").read_bytes() == BINARY
    assert ow("fetch", "ftjob-d", "-o", "elsewhere").exit_code == 0
    assert (tmp_path / "elsewhere" / "adapter" / "x.bin").read_bytes() == BINARY


def test_fetch_what_is_not_there(ow: Ow, backend: Backend, tmp_path: Path) -> None:
    submit(backend, "ftjob-new")
    (tmp_path / "file").write_text("kept")
    for arguments, said in (
        (("fetch", "result:file-0123456789ab"), "result:file-0123456789ab"),
        (("fetch", "ftjob-new", "-o", str(tmp_path / "file")), "is a file"),
        (("fetch", "nojob"), "no job nojob"),
    ):
        answer = ow(*arguments)
        assert answer.exit_code == 1
        assert answer.stderr.startswith("ow: ") and said in answer.stderr
    assert (tmp_path / "file").read_text() == "kept"
