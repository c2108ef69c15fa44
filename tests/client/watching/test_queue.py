"""What pending jobs wait for: of one, and of the first of a long queue."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.backends.local.backend import LocalBackend
from openweights.client.watching.queue import (
    Machine,
    QueueView,
    free_lanes,
    in_order,
    place_in_queue,
    waits_for,
    waits_on_this_machine,
)
from openweights.client.watching.waiting import state_of, states_of
from openweights.types import (
    ANSWERING_PREFIX,
    QUESTION_PRIORITY,
    SERVED,
    SERVING_PREFIX,
    Ahead,
    JobRecord,
    QueueState,
    WorkerRecord,
)
from tests.backends.steps import spec

LONG = 450
NOW = datetime(2026, 3, 3, 12, tzinfo=UTC)
NAMES = [f"job-{number}" for number in range(6)]


@st.composite
def jobs(draw: st.DrawFn, name: str) -> JobRecord:
    earlier = NAMES[: NAMES.index(name)]
    return JobRecord(
        id=name,
        type=draw(st.sampled_from(["fine-tuning", "inference", "script", SERVED])),
        script="",
        params={},
        status=draw(st.sampled_from(["pending", "pending", "in_progress"])),
        priority=draw(st.sampled_from([0, QUESTION_PRIORITY])),
        label=draw(st.sampled_from(["a", "b"])),
        max_running=draw(st.sampled_from([None, 1])),
        not_before=draw(st.sampled_from([None, NOW - timedelta(1), NOW + timedelta(1)])),
        after=tuple(draw(st.lists(st.sampled_from(earlier), max_size=1))) if earlier else (),
        requires_vram_gb=draw(st.sampled_from([0, 24])),
        created_at=NOW - timedelta(minutes=draw(st.integers(0, 3))),
    )


@st.composite
def queues(draw: st.DrawFn) -> QueueView:
    every = [draw(jobs(name)) for name in NAMES]
    return QueueView(
        running := [job for job in every if job.status == "in_progress"],
        [job for job in every if job.status == "pending"],
        QueueState(paused_at=draw(st.sampled_from([None, None, NOW]))),
        NOW,
        draw(st.sampled_from([None, Machine(running), Machine(running, 60.0, 30)])),
    )


def test_a_worker_that_is_there_is_not_said_to_start() -> None:
    job = JobRecord(id="ftjob-a", type="fine-tuning", script="", params={})
    served = replace(job, id="apijob-a", type=SERVED)
    workers = [WorkerRecord(f"{name}1") for name in ("worker-", SERVING_PREFIX, ANSWERING_PREFIX)]
    free = free_lanes(workers, [])
    assert free == {"jobs", "servers", "questions"}
    asked = replace(job, id="inferencejob-a", type="inference", priority=QUESTION_PRIORITY)
    long = replace(job, id="ftjob-b", status="in_progress", worker_id="worker-1")
    now, starts = "for its worker, which takes it now", "for its worker, which is starting"
    for waiting, running in ((job, []), (served, [long]), (asked, [long])):
        assert waits_on_this_machine(waiting, running, Ahead(), free=free) == now
        assert waits_on_this_machine(waiting, running, Ahead()) == starts, "nobody is there"
    # One that holds a job is not free, and one of another lane is no help.
    assert free_lanes(workers, [long]) == {"servers", "questions"}
    assert waits_on_this_machine(job, [], Ahead(), free=free_lanes(workers, [long])) == starts


@settings(suppress_health_check=[HealthCheck.too_slow])  # where others compute, too
@given(queues(), st.integers(0, 6))
def test_the_first_of_a_queue_wait_for_what_each_waits_for(queue: QueueView, most: int) -> None:
    each = {job.id: queue.reasons([job.id])[job.id] for job in queue.pending}
    first = in_order(queue.pending)[:most]
    assert queue.first_reasons(most) == {job.id: each[job.id] for job in first}
    assert queue.reasons(each) == each


class Counting:
    """A store that counts the pending jobs that it is asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def list_jobs(self, **asked: Any) -> list[JobRecord]:
        jobs = self._backend.list_jobs(**asked)
        self.read += sum(job.status == "pending" for job in jobs)
        return jobs


@pytest.fixture
def long_queue(tmp_path: Path) -> Iterator[Any]:
    with closing(LocalBackend(tmp_path)) as backend:
        for number in range(LONG):
            backend.submit_job(spec(f"job-{number}"))
        yield Counting(backend)


def test_a_long_queue_is_read_once_for_all_that_is_shown(long_queue: Any) -> None:
    shown = long_queue.list_jobs(limit=20)
    long_queue.read = 0
    states = states_of(long_queue, shown, is_remote=False)
    assert long_queue.read == LONG, "the control of the next test, too"
    assert states == {job.id: state_of(long_queue, job, is_remote=False) for job in shown}


def test_of_a_long_queue_no_job_is_read_for_one_of_them(long_queue: Any) -> None:
    """What `ow show` and `job.wait` say of a job, and whether a worker has to be started."""
    last = long_queue.get_job(f"job-{LONG - 1}")
    words = f"behind job-0 and {LONG - 2} more"
    assert state_of(long_queue, last, is_remote=False) == words
    assert (
        waits_for(long_queue, last, is_remote=True)
        == f"for a worker (SECURE), {LONG - 1} before it"
    )
    assert place_in_queue(long_queue, last, is_remote=False) == (LONG - 1, words)
    assert long_queue.place_in_queue().ahead.total == LONG
    assert long_queue.read == 0


def calls(of: Callable[[], object]) -> int:
    """How many calls, and steps of generators, it takes."""
    count = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        of()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("machine", [None, Machine()], ids=["project", "machine"])
def test_what_all_wait_for_takes_as_long_for_each_however_many_there_are(
    machine: Machine | None,
) -> None:
    def view(count: int) -> QueueView:
        pending = [
            JobRecord(f"job-{number}", "custom", "", {}, created_at=NOW) for number in range(count)
        ]
        return QueueView([], pending, QueueState(), NOW, machine)

    def one_by_one(queue: QueueView) -> None:
        for job in queue.pending:
            queue.reasons([job.id])

    few, many = view(100), view(200)
    ids = [job.id for job in many.pending]
    assert calls(lambda: many.reasons(ids)) < 2.2 * calls(lambda: few.reasons(ids[:100]))
    assert calls(lambda: one_by_one(many)) > 3 * calls(lambda: one_by_one(few)), "the control"
