"""One job from claim to end, on the real embedded store with shell scripts."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.errors import InvalidInputError
from openweights.hardware import Hardware
from openweights.settings import Settings
from openweights.types import FileRecord, Instruction, JobRecord, WorkerSpec
from openweights.worker.execution import shortfalls
from openweights.worker.folder import RunFolder, marker_of
from openweights.worker.process import ProcessEnd, marked_processes
from openweights.worker.verdict import describe_exit, judge, last_said
from tests.waiting import HANGS_S, NEVER_S, wait_until
from tests.worker.harness import Jobs, Outage, WorkerThread

InThread = Callable[..., WorkerThread]


SPOOL_FILE = "$OPENWEIGHTS_SPOOL/$OPENWEIGHTS_RUN_ID-1-01234567.jsonl"


def spool_line(key: str, data: str) -> str:
    return f'{{"key": "{key}", "created_at": "2026-01-01T00:00:00+00:00", "data": {data}}}'


def test_a_job_gets_its_files_and_its_environment(
    jobs: Jobs, backend: Backend, in_thread: InThread, home: Path
) -> None:
    bundle = BytesIO()
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("openweights_bundled/__init__.py", "WHERE = __file__\n")
    bundle_file = backend.put_file(BytesIO(bundle.getvalue()), "source", "source.zip").id
    script = (
        "cat data/in.txt; python -c 'import sys, openweights_bundled as m; "
        "print(sys.executable, m.WHERE)'; "
        "echo $OPENWEIGHTS_RUN_ID $OPENWEIGHTS_HOME $N_GPUS; "
        "test -d uploads && test -d $OPENWEIGHTS_SPOOL && pwd"
    )
    job = jobs.submit(script, {"data/in.txt": b"mounted\n"}, bundle_file=bundle_file)
    with in_thread(found=Hardware("2x L40S", 2, 90)):
        assert jobs.wait_for_end(job) == "completed"
    run = backend.list_runs(job_id=job.id)[0]
    folder = home / "runs" / str(run.id)
    where = folder / "openweights_bundled" / "__init__.py"
    assert jobs.log(job).decode().splitlines() == [
        "mounted",
        f"{sys.executable} {where}",
        f"{run.id} {home} 2",
        str(folder),
    ]
    assert not list((home / "runs").iterdir())
    assert (run.attempt, run.status, run.error) == (1, "completed", None)


def test_uploads_and_spool_become_events(jobs: Jobs, backend: Backend, worker: object) -> None:
    lines = "\\n".join([spool_line("a", '{"loss": 2}'), spool_line("b", '{"loss": 1}')])
    job = jobs.submit(
        "mkdir -p uploads/deep/er made; echo one > uploads/one; echo two > uploads/deep/er/two; "
        "echo made > made/three; ln -s ../made uploads/linked; ln -s ../../uploads made/circle; "
        "ln -s /etc uploads/etc; ln -s /etc/passwd uploads/passwd; ln -s nowhere uploads/broken; "
        "mkfifo uploads/pipe; "
        f"printf '{lines}\\n{{cut' > {SPOOL_FILE}"
    )
    assert jobs.wait_for_end(job) == "completed"
    events = jobs.events(job)
    assert events[:2] == [{"loss": 2}, {"loss": 1}]
    stored = {event["path"]: backend.open_file(event["file"]).read() for event in events[2:]}
    assert stored == {"one": b"one\n", "deep/er/two": b"two\n", "linked/three": b"made\n"}
    assert all(event["file"].startswith("result:file-") for event in events[2:])
    outputs = backend.get_job(job.id).outputs
    assert outputs is not None
    assert outputs["loss"] == 1


def test_checkpoints_go_when_the_job_has_completed_and_only_then(
    jobs: Jobs, backend: Backend, worker: object
) -> None:
    stored: dict[str, str] = {}
    for name, code in (("good", 0), ("bad", 1)):
        stored[name] = backend.put_file(BytesIO(name.encode()), "checkpoint", "c.tar").id
        line = spool_line(name, f'{{"type": "checkpoint", "step": 1, "file": "{stored[name]}"}}')
        job = jobs.submit(f"printf '{line}\\n' > {SPOOL_FILE}; exit {code}")
        assert jobs.wait_for_end(job) == ("failed" if code else "completed")
        assert jobs.events(job)[0]["file"] == stored[name]
    wait_until(lambda: [f.id for f in backend.list_files()] == [stored["bad"]])


def test_a_failing_job_says_why(jobs: Jobs, worker: object) -> None:
    cases = {
        "echo start; echo 'ValueError: no rows' >&2; exit 3": "exit code 3: ValueError: no rows",
        "exit 1": "exit code 1",
        "kill -SEGV $$": "killed by signal 11 (SIGSEGV)",
        "sh -c 'kill -KILL $$'; exit $?": "exit code 137 (SIGKILL, often for lack of memory)",
        "not-a-command-at-all": "exit code 127: sh: 1: not-a-command-at-all: not found",
    }
    submitted = [(jobs.submit(script), error) for script, error in cases.items()]
    for job, error in submitted:
        assert jobs.wait_for_end(job) == "failed"
        assert (jobs.error(job) or "").startswith(error)
        assert jobs.events(job)[-1] == {"error": jobs.error(job)}
        how, _, said = error.partition(": ")
        assert jobs.log(job).endswith(f"[openweights] failed: {how}\n".encode())
        assert jobs.log(job).count(said.encode() or b"failed") == 1, "it is said once"


def test_a_note_is_no_reason(jobs: Jobs, worker: object) -> None:
    silent = jobs.submit("exit 3", requires_vram_gb=24)
    speaking = jobs.submit("printf 'no rows'; exit 3", requires_vram_gb=24)
    assert jobs.wait_for_end(silent) == jobs.wait_for_end(speaking) == "failed"
    assert b"computes on its CPU" in jobs.log(silent) or b"asks for 24 GB" in jobs.log(silent)
    assert jobs.error(silent) == "exit code 3"
    assert jobs.error(speaking) == "exit code 3: no rows"


def test_scripts_can_be_executed(jobs: Jobs, worker: object) -> None:
    files = {"run.sh": b"#!/bin/sh\necho ran $1\n", "data.txt": b"#", "empty": b""}
    job = jobs.submit("./run.sh well && ! test -x data.txt && ! test -x empty", files)
    assert jobs.wait_for_end(job) == "completed"
    assert jobs.log(job) == b"ran well\n"


def test_what_cannot_be_stored_does_not_take_the_rest_along(jobs: Jobs, worker: object) -> None:
    job = jobs.submit(
        "cd uploads; echo a > a; echo z > z; python -c \"open(b'odd\\xff', 'w')\"; "
        "ln -s loop loop; mkfifo pipe; mkdir deep; echo x > deep/$(printf 'x%.0s' $(seq 255))"
    )
    assert jobs.wait_for_end(job) == "completed", jobs.log(job)
    assert [event["path"] for event in jobs.events(job)] == ["a", "deep/" + "x" * 255, "z"]
    log = jobs.log(job).decode()
    assert "[openweights] uploads: 'odd\\udcff' is not stored: its name is not UTF-8\n" in log
    assert "[openweights] uploads: 'pipe' is not stored" in log
    assert "[openweights] uploads: 'loop' is not stored" in log


class Picky:
    """A store that refuses large files, as a project's does: ten lines around a real one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def put_file(self, content: BinaryIO, purpose: str, filename: str) -> FileRecord:
        if len(content.read()) > 1000:
            raise InvalidInputError("the file is larger than the project's storage takes")
        content.seek(0)
        return self._backend.put_file(content, purpose, filename)


class SlowFiles(Picky):
    """A store on a slow line."""

    def put_file(self, content: BinaryIO, purpose: str, filename: str) -> FileRecord:
        time.sleep(0.01)
        return self._backend.put_file(content, purpose, filename)


def test_a_cancel_ends_the_collection_of_many_results(
    jobs: Jobs, backend: Backend, in_thread: Callable[..., WorkerThread], settings: Settings
) -> None:
    """After the time that a job has to end; all of them would take six seconds and more."""
    job = jobs.submit("for n in $(seq 600); do echo $n > uploads/$n; done")
    with in_thread(SlowFiles(backend)):
        wait_until(lambda: jobs.events(job))
        canceled_at = time.monotonic()
        backend.cancel_job(job.id)
        wait_until(lambda: backend.list_runs(job_id=job.id)[0].status == "canceled")
    assert time.monotonic() - canceled_at > settings.cancel_grace_s
    assert len(jobs.events(job)) < 600
    assert b"not stored: the job was canceled" in jobs.log(job)


def test_a_result_that_the_store_refuses_is_left_out(
    jobs: Jobs, backend: Backend, in_thread: InThread
) -> None:
    with in_thread(Picky(backend)):
        job = jobs.submit("cd uploads; echo a > a; head -c 2000 /dev/zero > big.bin; echo z > z")
        assert jobs.wait_for_end(job) == "completed", jobs.error(job)
    assert [event["path"] for event in jobs.events(job)] == ["a", "z"]
    assert "uploads: 'big.bin' is not stored: the file is larger" in jobs.log(job).decode()


@pytest.mark.parametrize(
    ("instruction", "end", "outcome", "reason"),
    [
        ("continue", ProcessEnd(0, was_stopped=False), "completed", None),
        ("continue", ProcessEnd(-9, was_stopped=True), "released", "stood still for longer than"),
        ("continue", ProcessEnd(None, was_stopped=True), "released", "stood still for longer than"),
        ("continue", ProcessEnd(None, was_stopped=False), "lost", "guards the job was killed"),
        ("cancel", ProcessEnd(-15, was_stopped=True), "canceled", "on request"),
        ("cancel", ProcessEnd(0, was_stopped=False), "completed", None),
        ("timeout", ProcessEnd(-15, was_stopped=True), "failed", "its timeout has passed"),
        ("shutdown", ProcessEnd(-15, was_stopped=True), "released", "was shut down"),
        ("shutdown", ProcessEnd(143, was_stopped=False), "released", "was shut down"),
        ("shutdown", ProcessEnd(1, was_stopped=False), "failed", "exit code 1: last words"),
        ("fenced", ProcessEnd(0, was_stopped=False), "fenced", None),
    ],
)
def test_what_a_run_came_to(
    instruction: Instruction, end: ProcessEnd, outcome: str, reason: str | None
) -> None:
    verdict = judge(instruction, end, "last words")
    assert verdict.outcome == outcome
    assert verdict.reason is None if reason is None else reason in str(verdict.reason)


def test_results_that_take_a_while_to_store_are_said_to_be_stored(
    jobs: Jobs, worker: object
) -> None:
    small = jobs.submit("head -c 1000 /dev/zero > uploads/small")
    large = jobs.submit("for n in 1 2; do head -c 20000000 /dev/zero > uploads/$n; done")
    assert [jobs.wait_for_end(job) for job in (small, large)] == ["completed"] * 2
    assert [e.get("doing") for e in jobs.events(small)] == [None]
    assert [e.get("doing") for e in jobs.events(large)] == [
        "storing the results (40 MB)",
        None,
        None,
    ]


def test_uploads_that_are_no_folder_any_more(jobs: Jobs, worker: object) -> None:
    job = jobs.submit("rmdir uploads; echo mine > uploads")
    assert jobs.wait_for_end(job) == "completed", jobs.error(job)
    assert "uploads is no folder any more, and is not stored" in jobs.log(job).decode()


def test_the_last_words_count_that_might_begin_a_secret(
    jobs: Jobs, in_thread: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "no rows left")
    with in_thread():
        job = jobs.submit("printf 'Error: no rows'; exit 3")
        jobs.wait_for_end(job)
    assert jobs.error(job) == "exit code 3: Error: no rows"


def test_a_folder_that_cannot_be_made_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openweights.worker.folder.SPOOL", "uploads")  # so that mkdir fails
    with pytest.raises(FileExistsError):
        RunFolder(tmp_path, 7)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("openweights.worker.folder.LOCK_WAIT_S", NEVER_S)
    begun = time.monotonic()
    RunFolder(tmp_path, 7).remove()
    assert time.monotonic() - begun < HANGS_S


def test_whatever_is_wrong_with_one_job_the_worker_goes_on(
    jobs: Jobs, backend: Backend, worker: WorkerThread
) -> None:
    def file(content: bytes) -> str:
        return backend.put_file(BytesIO(content), "source", "source.zip").id

    slip = BytesIO()
    with zipfile.ZipFile(slip, "w") as archive:
        archive.writestr("../slipped", "x")
    whole = BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("member", "x" * 1000)
    damaged = whole.getvalue().replace(b"xxxx", b"yyyy", 1)
    cases = [
        (jobs.submit("true", bundle_file=file(b"no zip")), "not a readable zip"),
        (jobs.submit("true", bundle_file=file(damaged)), "not a readable zip"),
        (jobs.submit("true", bundle_file=file(slip.getvalue())), "'../slipped' leaves"),
        (jobs.submit("true", bundle_file="source:file-0123456789ab"), "source:file-0123456789ab"),
        (jobs.submit("true", {"../../outside": b""}), "'../../outside' leaves"),
        (jobs.submit("true", {"/etc/outside": b""}), "'/etc/outside' leaves"),
        (jobs.submit("true", {"uploads": b""}), "both a file and a folder"),
    ]
    with pytest.raises(InvalidInputError, match="at most 120000"):
        jobs.submit("x" * 200_000)
    last = jobs.submit("echo fine")
    for job, reason in cases:
        assert jobs.wait_for_end(job) == "failed"
        error = jobs.error(job) or ""
        assert reason in error
        assert "\n" not in error
        assert error.encode() in jobs.log(job)
    assert jobs.wait_for_end(last) == "completed"
    assert worker.exit_code is None


def test_output_is_stored_as_it_comes_in_bytes_and_without_secrets(
    jobs: Jobs, backend: Backend, settings: Settings, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789")
    job = jobs.submit(
        "printf '\\303'; sleep 0.3; printf '\\244 \\377 one\\n'; printf sk-0123; sleep 0.4; "
        "printf '456789 two\\n'; while ! test -e go; do sleep 0.05; done; echo three"
    )
    with WorkerThread(settings, backend, Hardware("cpu", 0, 0)):
        jobs.wait_for_log(job, b"two")
        assert jobs.log(job) == b"\xc3\xa4 \xff one\n[MY_API_KEY redacted] two\n"
        run = backend.list_runs(job_id=job.id)[0]
        (home / "runs" / str(run.id) / "go").touch()
        assert jobs.wait_for_end(job) == "completed"
    assert jobs.log(job).endswith(b"two\nthree\n")


def test_much_output(jobs: Jobs, worker: object) -> None:
    job = jobs.submit("seq 1 400000")
    assert jobs.wait_for_end(job) == "completed"
    size = len(b"".join(b"%d\n" % n for n in range(1, 400001)))
    log = b"".join(
        jobs.backend.read_log(1, offset, 1 << 20) for offset in range(0, size + 1, 1 << 20)
    )
    assert len(log) == size
    assert log.endswith(b"399999\n400000\n")


def test_cancel_reaches_the_job_at_a_heartbeat(jobs: Jobs, worker: object, home: Path) -> None:
    polite = jobs.submit("trap 'echo saving; exit 0' TERM; echo up; while :; do sleep 0.05; done")
    jobs.wait_for_log(polite, b"up")
    jobs.backend.cancel_job(polite.id)
    run = jobs.backend.list_runs(job_id=polite.id)[0]
    wait_until(lambda: jobs.backend.get_run(run.id).status == "canceled")
    assert b"saving" in jobs.log(polite)

    stubborn = jobs.submit("trap '' TERM; echo up; setsid sleep 999 & while :; do sleep 0.05; done")
    jobs.wait_for_log(stubborn, b"up")
    jobs.backend.cancel_job(stubborn.id)
    last = jobs.submit("echo next")
    assert jobs.wait_for_end(last) == "completed"
    assert jobs.status(stubborn) == "canceled"
    assert not marked_processes(marker_of(home / "runs" / str(run.id + 1)))


def test_a_cancel_while_the_folder_is_filled_starts_nothing(
    jobs: Jobs, backend: Backend, in_thread: InThread
) -> None:
    store = Outage(backend)
    store.away = {"open_file"}
    job = jobs.submit("echo never", {"data": b""})
    with in_thread(store):
        wait_until(lambda: "open_file" in store.refused)
        backend.cancel_job(job.id)
        time.sleep(0.5)
        store.away = False
        wait_until(lambda: backend.get_run(1).status == "canceled")
    assert jobs.log(job) == b"[openweights] canceled: on request\n"


def test_timeout(jobs: Jobs, worker: object) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    job = jobs.submit("echo up; sleep 9999", timeout_at=soon)
    assert jobs.wait_for_end(job) == "failed"
    assert jobs.error(job) == "stopped: its timeout has passed"
    assert b"up" in jobs.log(job)


def test_the_job_goes_on_while_the_store_is_away(
    jobs: Jobs, backend: Backend, in_thread: InThread, tmp_path: Path
) -> None:
    store = Outage(backend)
    step = spool_line("a", '{"step": 1}')
    job = jobs.submit(
        f"echo before; while ! test -e {tmp_path}/away; do sleep 0.02; done; echo during; "
        f"printf '{step}\\n' "
        f"> {SPOOL_FILE}; "
        f"echo result > uploads/r; touch {tmp_path}/done"
    )
    with in_thread(store):
        jobs.wait_for_log(job, b"before")
        store.away = True
        (tmp_path / "away").touch()
        wait_until((tmp_path / "done").exists)
        wait_until(lambda: {"heartbeat", "append_log"} <= set(store.refused))
        time.sleep(1.0)
        assert jobs.status(job) == "in_progress"
        assert b"during" not in jobs.log(job)
        store.away = False
        assert jobs.wait_for_end(job) == "completed"
    assert jobs.log(job) == b"before\nduring\n"
    assert jobs.events(job)[0] == {"step": 1}
    assert jobs.events(job)[1]["path"] == "r"
    assert len(jobs.events(job)) == 2


def test_a_fenced_run_is_killed_and_writes_nothing(
    jobs: Jobs, backend: Backend, settings: Settings
) -> None:
    short = Settings(home=settings.home, lease_s=0.6, heartbeat_s=0.1, cancel_grace_s=NEVER_S)
    store = Outage(open_backend(short))
    of_run = marker_of(settings.home / "runs" / "1")
    job = jobs.submit("trap '' TERM; echo up; while :; do sleep 0.05; done; echo late > uploads/x")
    with WorkerThread(short, store, Hardware("cpu", 0, 0)) as running:
        jobs.wait_for_log(job, b"up")
        store.away = True
        # A lease alone gives nothing away on one machine; a restart does.
        backend.cancel_job(job.id)
        backend.restart_job(job.id)
        backend.register_worker(WorkerSpec("other"))
        claim = backend.claim_job("other")
        assert claim is not None and claim.run.attempt == 2
        store.away = False
        wait_until(lambda: not marked_processes(of_run))
        wait_until(lambda: not list((settings.home / "runs").iterdir()))
        assert running.exit_code is None
    assert (jobs.status(job), backend.get_run(1).status) == ("in_progress", "canceled")
    assert backend.read_log(1) == b"up\n"
    assert jobs.events(job) == []
    store._backend.close()


def test_the_log_says_what_this_machine_lacks(jobs: Jobs, worker: object) -> None:
    job = jobs.submit("echo ran", requires_vram_gb=80, allowed_hardware=("1x H200",))
    assert jobs.wait_for_end(job) == "completed"
    first, second, third = jobs.log(job).decode().splitlines()
    assert first.endswith("this machine has no GPU: the job computes on its CPU")
    assert "1x H200" in second
    assert third == "ran"
    quiet = jobs.submit("echo ran")
    assert jobs.wait_for_end(quiet) == "completed"
    assert jobs.log(quiet).decode() == "ran\n"


def test_a_gpu_that_may_be_too_small_is_named() -> None:
    job = JobRecord(id="j", type="custom", script="", params={}, requires_vram_gb=80)
    (line,) = shortfalls(job, Hardware("1x RTX4090", 1, 24))
    assert "asks for 80 GB of GPU memory and this machine has 24 (1x RTX4090)" in line
    assert shortfalls(job, Hardware("1x H200", 1, 139)) == []


def test_exit_codes_in_words() -> None:
    assert describe_exit(-15, "") == "killed by signal 15 (SIGTERM)"
    assert describe_exit(255, "x") == "exit code 255: x"
    logged = "2026-11-29 11:06:06,623 ERROR model: org/name is gated; ask for access"
    assert describe_exit(1, logged) == "exit code 1: model: org/name is gated; ask for access"
    assert len(describe_exit(1, "y" * 1000)) == 400


def test_why_it_ended_is_what_it_said_before_it_cleaned_up() -> None:
    at = "2026-11-29 11:06:06,623"
    why, late = (
        f"{at} ERROR the disk is full",
        f"{at} WARNING events of run 1 were not sent in time",
    )
    assert last_said(f"step 3\n{why}\n{late}\n{at} INFO bye\n\n") == why
    assert last_said(f"{why}\nTraceback\nOSError: no space") == "OSError: no space"
    # Without an error before it a warning may be all that there is.
    assert last_said(f"step 3\n{late}\n") == late
    assert last_said(f"{why}\nstep 4\n{late}") == late
    assert (last_said("one"), last_said("")) == ("one", "")


def test_folders_without_permissions_and_root(jobs: Jobs, worker: object, home: Path) -> None:
    job = jobs.submit("mkdir locked; touch locked/x; chmod 000 locked")
    assert jobs.wait_for_end(job) == "completed"
    wait_until(lambda: not os.listdir(home / "runs"))


@pytest.mark.parametrize("name", ["uploads", ".spool", "."])
def test_a_folder_that_a_link_replaces_gives_nothing_away(
    jobs: Jobs, backend: Backend, worker: object, tmp_path: Path, home: Path, name: str
) -> None:
    """Neither is what the link leads to stored, nor removed, nor made writable."""
    other = tmp_path / "other"
    (other / "closed").mkdir(parents=True)
    (other / "uploads").mkdir()
    for place in (other / "mine", other / "uploads" / "mine", other / "1-1-01234567.jsonl"):
        place.write_text('{"key": "k", "created_at": "2026-01-02T03:04:05+00:00", "data": {}}\n')
    (other / "closed").chmod(0o500)
    place = "$PWD" if name == "." else f"$PWD/{name}"
    job = jobs.submit(f'p="{place}"; mv "$p" {tmp_path}/away; ln -s {other} "$p"')
    status = jobs.wait_for_end(job)
    assert status == ("failed" if name == "." else "completed")
    if name == ".":
        assert jobs.error(job) == "the job has moved or replaced its own folder"
    assert not any("file" in event or not event for event in jobs.events(job))
    wait_until(lambda: not list((home / "runs").iterdir()))
    assert (other / "closed").stat().st_mode & 0o777 == 0o500
    assert len(list(other.rglob("*"))) == 5
