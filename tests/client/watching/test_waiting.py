"""Waiting for a job and following its log, with the test in the worker's place."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openweights import (
    InvalidStateError,
    JobCanceledError,
    JobFailedError,
    NotFoundError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from openweights.client.watching.waiting import patiently
from openweights.types import Claim, EventRecord
from tests.client.conftest import QuietClient, append, every_store  # noqa: F401 - a fixture
from tests.client.kinds import Echo

REPOSITORY = Path(__file__).parents[3]
Take = Callable[[], Claim]


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Runs `work` beside the body; its errors are raised afterwards."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the test below
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def test_each_event_once_and_in_order(
    ow: QuietClient, claim: Take, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Echo(ow).create(text="a")
    first = claim().run
    append(ow.backend, first.id, {"n": 0}, {"n": 1})
    ow.backend.release_run(first.id, first.attempt, reason="test")

    def work() -> None:
        run = claim().run
        for number in range(2, 60):
            append(ow.backend, run.id, {"n": number})
            time.sleep(0.002)
        ow.backend.finish_run(run.id, run.attempt, "completed")

    seen: list[EventRecord] = []
    with in_background(work):
        assert job.wait(timeout=30, on_event=seen.append, poll_s=0.01) is job
    assert [event.data["n"] for event in seen] == list(range(60))
    assert job.status == "completed" and job.outputs == {"n": 59}
    # Waiting again for what has ended shows the same events.
    again: list[EventRecord] = []
    job.wait(on_event=again.append)
    assert again == seen
    out, err = capfd.readouterr()
    assert out == err == "", "without a terminal nothing is shown"


def test_failed_job_says_why(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    log = "".join(f"line {number}\n" for number in range(3000)) + "ValueError: bad luck\n"
    ow.backend.append_log(run.id, 0, log.encode())
    ow.backend.finish_run(run.id, run.attempt, "failed", error="exit code 1")
    with pytest.raises(JobFailedError) as caught:
        job.wait()
    first, second, *tail = str(caught.value).splitlines()
    assert first == f"job {job.id} failed: exit code 1"
    assert second == "last lines of its log:"
    assert len(tail) == 20 and tail[-1].strip() == "ValueError: bad luck"
    assert job.restart().status == "pending"


def test_canceled_job(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    with in_background(lambda: (time.sleep(0.1), job.cancel())[0]), pytest.raises(JobCanceledError):
        ow.jobs.retrieve(job.id).wait(poll_s=0.02)
    assert job.refresh().status == "canceled"
    run = (job.restart(), claim().run)[1]
    ow.backend.finish_run(run.id, run.attempt, "completed")
    for illegal in (job.cancel, job.restart):
        with pytest.raises(InvalidStateError):
            illegal()


def test_impatience_does_not_touch_the_job(
    ow: QuietClient, claim: Take, caplog: pytest.LogCaptureFixture
) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    start = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=f"job {job.id} is still in progress; it goes on"):
        job.wait(timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 2
    append(ow.backend, run.id, {"n": 1})

    def interrupt(event: EventRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait(on_event=interrupt)
    assert f"job {job.id} goes on; `ow cancel {job.id}` stops it" in caplog.text
    assert job.refresh().status == "in_progress"


IN_A_TERMINAL = """
import sys
from openweights import OpenWeights
OpenWeights().jobs.retrieve(sys.argv[1]).wait()
"""


def test_bar_on_a_terminal(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    append(
        ow.backend,
        run.id,
        {"type": "start", "step": 0, "max_steps": 40},
        {"step": 17, "loss": 0.123456},
        {"step": 23, "loss": 0.25},
    )
    ow.backend.finish_run(run.id, run.attempt, "completed")
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", IN_A_TERMINAL, job.id]
    with subprocess.Popen(command, env=env, stderr=theirs):
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    text = shown.decode()
    assert job.id in text and "23/40" in text and "completed" in text and "loss 0.25" in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError as error:
        # What a terminal says when nobody writes to it any more.
        assert error.errno == errno.EIO
        return b""


def test_logs(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    assert job.logs() == ""
    first = claim().run
    ow.backend.append_log(first.id, 0, b"first\n")
    ow.backend.release_run(first.id, first.attempt, reason="test")
    second = claim().run
    ow.backend.append_log(second.id, 0, "žluť\xff".encode("latin2", "ignore") + b"\nsecond\n")
    assert job.logs().endswith("\nsecond\n"), "bytes that are no UTF-8 do no harm"
    assert job.logs(run_id=first.id) == "first\n"
    assert "".join(job.logs(follow=True, run_id=first.id)) == "first\n"
    other = Echo(ow).create(text="b")
    for follow in (True, False):
        with pytest.raises(NotFoundError, match=f"job {other.id} has no run {first.id}"):
            other.logs(follow, run_id=first.id)  # pyright: ignore


def test_following_spans_runs_and_ends_with_the_job(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    text = "žluťoučký kůň 🐎\n".encode()

    def work() -> None:
        time.sleep(0.2)
        first = claim().run
        for offset in range(len(text)):
            ow.backend.append_log(first.id, offset, text[offset : offset + 1])
            time.sleep(0.005)
        ow.backend.release_run(first.id, first.attempt, reason="worker lost")
        second = claim().run
        ow.backend.append_log(second.id, 0, b"second\n")
        ow.backend.finish_run(second.id, second.attempt, "completed")

    with in_background(work):
        chunks = list(job.logs(follow=True))
    assert "".join(chunks) == text.decode() + "second\n"
    assert list(job.logs(follow=True)) == ["second\n"]


def test_following_a_restarted_job_shows_the_new_run_only(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    first = claim().run
    ow.backend.append_log(first.id, 0, b"old\n")
    ow.backend.finish_run(first.id, first.attempt, "failed", error="x")
    assert list(job.logs(follow=True)) == ["old\n"]
    job.restart()

    def work() -> None:
        run = claim().run
        ow.backend.append_log(run.id, 0, b"new\n")
        ow.backend.finish_run(run.id, run.attempt, "completed")

    follower = job.logs(follow=True)
    with in_background(work):
        assert list(follower)[-1] == "new\n"


def test_a_store_that_is_away_for_a_moment_ends_no_waiting() -> None:
    answers = iter([StoreUnavailableError("away"), "here"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, StoreUnavailableError):
            raise answer
        return answer

    assert patiently(call) == "here"
