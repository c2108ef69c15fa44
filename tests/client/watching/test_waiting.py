"""Waiting for a job and following its log, with the test in the worker's place."""

from __future__ import annotations

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

from openweights import (
    InvalidStateError,
    JobCanceledError,
    JobFailedError,
    NotFoundError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from openweights.backends.base import Backend
from openweights.client import Job
from openweights.client.watching.progress import read_progress
from openweights.client.watching.waiting import patiently, state_of, wait_for
from openweights.events import Checkpoint
from openweights.types import Claim, EventDraft, EventRecord, JobSpec
from tests.client.conftest import QuietClient, append, every_store  # noqa: F401 - a fixture
from tests.client.kinds import Echo
from tests.waiting import HANGS_S, wait_until

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
        assert job.wait(timeout=HANGS_S, on_event=seen.append, poll_s=0.01) is job
    assert [event.data["n"] for event in seen] == list(range(60))
    assert job.status == "completed" and job.outputs == {"n": 59}
    out, err = capfd.readouterr()
    assert out == ""
    told = [line.split(" · ")[1].split(":")[0] for line in err.splitlines()]
    states = [state for state, _ in groupby(told)]
    assert states[-2:] == ["in progress", "completed"] and states[:-2] in ([], ["pending"])
    # Waiting again for what has ended gives the same events, and has nothing to say.
    again: list[EventRecord] = []
    job.wait(on_event=again.append)
    assert again == seen
    assert capfd.readouterr() == ("", "")


def test_a_job_that_begins_again_says_why_and_where(
    ow: QuietClient, claim: Take, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = JobSpec("ftjob-again", "fine-tuning", "true", {})
    ow.backend.submit_job(spec)
    job = ow.jobs.retrieve(spec.id)
    state = partial(state_of, ow.backend, is_remote=False)
    begun = {"type": "started", "max_steps": 6, "from_step": 0}
    assert "attempt" not in state(job.record), "the first needs no word"
    run = claim().run
    append(ow.backend, run.id, begun, {"step": 2, "elapsed_s": 42.0})
    ow.backend.release_run(run.id, run.attempt, reason="worker w is gone", is_lost=True)
    waits = "worker w is gone; attempt 2, from step 0 (no checkpoint yet)"
    assert state(job.refresh().record).endswith(f" · {waits}")

    told: list[str] = []

    def until_told(words: str) -> None:
        """Else it could be over before it is seen."""
        before = len(told)

        def is_told() -> bool:
            told.extend(capfd.readouterr().err.splitlines())
            return any(words in line for line in told[before:])

        wait_until(is_told, words)

    def work() -> None:
        until_told("pending")
        run = claim().run
        until_told("in progress")  # it has said nothing yet
        assert state(job.refresh().record) == waits
        for doing in ("loading the model", "teacher gate", "trying the demonstrations"):
            append(ow.backend, run.id, {"type": "stage", "doing": doing})
            until_told(doing)
        append(ow.backend, run.id, begun, {"step": 4}, {"type": "checkpoint", "step": 4})
        until_told("step 4/6")
        ow.backend.release_run(run.id, run.attempt, reason="worker w is gone", is_lost=True)
        until_told("pending")
        run = claim().run
        until_told("in progress")
        ow.backend.finish_run(run.id, run.attempt, "completed")

    with in_background(work):
        ow.jobs.retrieve(job.id).wait(timeout=HANGS_S, poll_s=0.01)
    told += capfd.readouterr().err.splitlines()
    assert told[0].endswith(waits) and told[0].split(" · ")[1].startswith("pending: for ")
    assert told[1] == f"{job.id} · in progress: {waits}", "no step of the run before"
    assert told[2:5] == [
        f"{job.id} · in progress: {waits} · loading the model",
        f"{job.id} · in progress · teacher gate",
        f"{job.id} · in progress · trying the demonstrations",
    ], "it is told once"
    assert told[-2] == f"{job.id} · in progress: worker w is gone; attempt 3, from step 4"
    assert told[-1] == f"{job.id} · completed"
    assert sum("step 2/6" in line for line in told) == 0


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


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        ("exit code 1: model: is none", "2026-11-29 13:51:14,853 ERROR model: is none\n"),
        ("exit code 1: " + "x" * 50 + "…", "x" * 90 + "\n"),
        ("out of memory: lower r (8) (exit code 1)", ""),
    ],
)
def test_why_a_job_failed_is_said_once(ow: QuietClient, claim: Take, reason: str, end: str) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    log = f"line 1\nline 2\n{end}[openweights] failed: exit code 1\n"
    ow.backend.append_log(run.id, 0, log.encode())
    ow.backend.finish_run(run.id, run.attempt, "failed", error=reason)
    with pytest.raises(JobFailedError) as caught:
        job.wait()
    told = f"job {job.id} failed: {reason}", "last lines of its log:", "    line 1", "    line 2"
    assert tuple(str(caught.value).splitlines()) == told


def test_a_failure_says_from_where_a_restart_goes_on(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    for step in (4, 8):
        append(ow.backend, run.id, Checkpoint(step=step, file="file-1").data())
    ow.backend.finish_run(run.id, run.attempt, "failed", error="exit code 137 (SIGKILL)")
    with pytest.raises(JobFailedError, match=f"`ow restart {job.id}` goes on from .* of step 8$"):
        job.wait()


def test_canceling_by_the_beginning_of_an_id(ow: QuietClient) -> None:
    job = Echo(ow).create(text="a")
    assert ow.jobs.cancel(job.id[:-3]).status == job.refresh().status == "canceled"


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


def test_impatience_does_not_touch_the_job(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    start = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=f"job {job.id} is still in progress; it goes on"):
        job.wait(timeout=0.2)
    assert 0.2 <= time.monotonic() - start < HANGS_S
    append(ow.backend, run.id, {"n": 1})

    def interrupt(event: EventRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        job.wait(on_event=interrupt)
    assert stopped.value.__notes__ == [f"job {job.id} goes on; `ow cancel {job.id}` stops it"]
    assert job.refresh().status == "in_progress"


WAIT = """
import sys
from openweights import OpenWeights
OpenWeights().jobs.retrieve(sys.argv[1]).wait()
"""


def test_the_last_that_ctrl_c_shows_is_that_the_job_goes_on(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    append(ow.backend, claim().run.id, {"n": 1})
    script = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler){WAIT}"
    script = script.replace(".wait()", ".wait(on_event=lambda _: print('waits', flush=True))")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", script, job.id],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=HANGS_S)
    *_, error, last = told.splitlines()
    assert error == "KeyboardInterrupt"
    assert last == f"job {job.id} goes on; `ow cancel {job.id}` stops it"
    assert told.count("goes on") == 1


@pytest.fixture
def trained(ow: QuietClient, claim: Take) -> Job:
    """A job that has made 23 of 40 steps, one each half second, and then ended."""
    job = Echo(ow).create(text="a")
    run = claim().run
    start = datetime.now(UTC)
    drafts = [
        EventDraft("a", {"type": "started", "max_steps": 40, "from_step": 0}, start),
        EventDraft("b", {"step": 17, "loss": 0.123456}, start + timedelta(seconds=8.5)),
        EventDraft("c", {"step": 23, "loss": 0.25}, start + timedelta(seconds=11.5)),
    ]
    ow.backend.append_events(run.id, drafts)
    ow.backend.finish_run(run.id, run.attempt, "completed")
    return job


def test_bar_on_a_terminal(trained: Job) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "150"}
    command = [sys.executable, "-c", WAIT, trained.id]
    with subprocess.Popen(command, env=env, stderr=theirs):
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    last = text.strip().splitlines()[-1]
    assert last.startswith(trained.id)
    assert "completed · step 23/40 · 2 steps/s" in last and last.endswith("loss 0.25")


# What a kernel has: IPython with a shell that has a kernel, and `display` with a handle.
NOTEBOOK = """
import sys, types
class Handle:
    def update(self, shown):
        print(shown._repr_html_())
def display(shown, display_id):
    return Handle()
shell = types.SimpleNamespace(kernel=None)
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["IPython.display"] = types.SimpleNamespace(display=display)
"""


def test_bar_in_a_notebook(trained: Job) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", NOTEBOOK + WAIT, trained.id]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    (html,) = ended.stdout.splitlines()
    assert html.startswith('<progress value="23" max="40"></progress> ' + trained.id)
    assert "\x1b" not in html and ended.stderr == ""


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError as error:
        # What a terminal says when nobody writes to it any more.
        assert error.errno == errno.EIO
        return b""


def test_a_rate_does_not_grow_while_somebody_looks(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run

    def rates() -> set[float | None]:
        found = {read_progress(ow.backend, ow.backend.get_job(job.id)).seconds_per_step}
        time.sleep(0.1)
        return found | {read_progress(ow.backend, ow.backend.get_job(job.id)).seconds_per_step}

    append(ow.backend, run.id, {"type": "started", "max_steps": 9, "from_step": 0}, {"step": 1})
    assert rates() == {None}, "one step tells of no rate"
    append(ow.backend, run.id, {"step": 2})
    assert len(rates()) == 2, "the control: nothing says when the step was reached"
    append(ow.backend, run.id, {"step": 3, "elapsed_s": 50.0, "loss": 1.0})
    (rate,) = rates()
    assert rate == pytest.approx(25.0, abs=1.0)
    append(ow.backend, run.id, {"tag": "everyday", "step": 3, "kl_to_base": 0.5})
    assert rates() == {rate}


class Counting:
    """A store that counts how often a history is read from some event on."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def list_events(self, *, after: int = 0, **asked: Any) -> Any:
        self.reads += after > 0
        return self._backend.list_events(after=after, **asked)


def test_the_first_step_is_looked_for_once(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    run = claim().run
    store = cast("Backend", counting := Counting(ow.backend))

    def look() -> tuple[float | None, int]:
        before = counting.reads
        found = read_progress(store, ow.backend.get_job(job.id))
        return found.seconds_per_step, counting.reads - before

    append(ow.backend, run.id, {"type": "started", "max_steps": 9, "from_step": 0})
    assert [look(), look()] == [(None, 1)] * 2, "the control: as long as there is none"
    append(ow.backend, run.id, {"step": 1, "elapsed_s": 10.0}, {"step": 3, "elapsed_s": 50.0})
    looks = [look(), look()]
    assert [reads for _, reads in looks] == [1, 0] and looks[0] == (pytest.approx(20.0), 1)
    assert looks[1][0] == looks[0][0]
    # It begins again: another start, another first step.
    append(ow.backend, run.id, {"type": "started", "max_steps": 9, "from_step": 3})
    append(ow.backend, run.id, {"step": 4, "elapsed_s": 2.0}, {"step": 5, "elapsed_s": 7.0})
    assert [look(), look()] == [(pytest.approx(5.0), 1), (pytest.approx(5.0), 0)]


def test_what_is_done_behind_the_last_step_is_said(ow: QuietClient, claim: Take) -> None:
    """To who looks once, as `ow ls` and the page do; `wait` follows the events one by one."""
    job = Echo(ow).create(text="a")
    run = claim().run
    looks: list[str] = []

    def log(*data: dict[str, object]) -> None:
        append(ow.backend, run.id, *data)
        words = read_progress(ow.backend, ow.backend.get_job(job.id)).words()
        looks.append(re.sub(r"[\d.]+ s(teps)?/s(tep)?", "rate", words))

    log({"type": "stage", "doing": "loading"})
    log({"type": "started", "max_steps": 2, "from_step": 0}, {"step": 1, "loss": 2.0})
    log({"type": "stage", "doing": "trying", "step": 2})
    log({"type": "teacher_gate", "step": 2}, {"tag": "everyday", "step": 2, "kl_to_base": 0.5})
    log({"step": 2, "loss": 1.0}, {"type": "stage", "doing": "measuring", "step": 2})
    log({"step": 2, "eval_loss": 1.5, "tag": "eval"})
    log({"type": "stage", "doing": "saving the result", "step": 2})
    said = [words.partition(" · ")[0] for words in looks]
    assert said == ["loading", "step 1/2", "trying", "trying", "measuring", "step 2/2"] + [
        "saving the result"
    ]
    assert not any("left" in words for words in looks[2:]) and "step 2/2" in looks[-1]
    ow.backend.finish_run(run.id, run.attempt, "completed")
    assert read_progress(ow.backend, ow.backend.get_job(job.id)).words().startswith("step 2/2")


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
    chunks: list[str] = []

    def work() -> None:
        first = claim().run
        for offset in range(len(text)):
            ow.backend.append_log(first.id, offset, text[offset : offset + 1])
            time.sleep(0.005)
        wait_until(lambda: chunks, "somebody who follows")
        ow.backend.release_run(first.id, first.attempt, reason="worker lost")
        second = claim().run
        ow.backend.append_log(second.id, 0, b"second\n")
        ow.backend.finish_run(second.id, second.attempt, "completed")

    with in_background(work):
        chunks.extend(job.logs(follow=True))
    assert "".join(chunks) == text.decode() + "second\n"
    assert list(job.logs(follow=True)) == ["second\n"]


def test_following_a_restarted_job_shows_the_new_run_only(ow: QuietClient, claim: Take) -> None:
    job = Echo(ow).create(text="a")
    first = claim().run
    ow.backend.append_log(first.id, 0, b"old\n")
    ow.backend.finish_run(first.id, first.attempt, "failed", error="x")
    assert list(job.logs(follow=True)) == ["old\n"]
    job.restart()

    shown: list[str] = []
    with in_background(lambda: shown.extend(job.logs(follow=True))):
        time.sleep(0.3)  # it looks while the job still waits to be run again
        run = claim().run
        ow.backend.append_log(run.id, 0, b"new\n")
        ow.backend.finish_run(run.id, run.attempt, "completed")
    assert shown == ["new\n"]


def test_a_timeout_holds_also_while_the_store_is_away() -> None:
    class Away(QuietClient):
        """Its store does not answer, as one whose network is gone."""

        @property
        def backend(self) -> NoReturn:
            raise StoreUnavailableError("no route to host")

    start = time.monotonic()
    with pytest.raises(WaitTimeoutError, match="no route to host"):
        wait_for(Away(), "ftjob-1", 0.5, None, 0.1)
    assert 0.5 <= time.monotonic() - start < HANGS_S


def test_a_store_that_is_away_for_a_moment_ends_no_waiting() -> None:
    answers = iter([StoreUnavailableError("away"), "here"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, StoreUnavailableError):
            raise answer
        return answer

    assert patiently(call) == "here"
