"""What pending jobs wait for: of one, and of the first of a long queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.backends.local.backend import LocalBackend
from openweights.client.watching.queue import (
    DueJobs,
    QueueView,
    due_jobs,
    free_lanes,
    in_order,
    waits_on_this_machine,
)
from openweights.client.watching.waiting import state_of, states_of
from openweights.types import (
    ANSWERING_PREFIX,
    QUESTION_PRIORITY,
    SERVED,
    SERVING_PREFIX,
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
        [job for job in every if job.status == "in_progress"],
        [job for job in every if job.status == "pending"],
        QueueState(paused_at=draw(st.sampled_from([None, None, NOW]))),
        NOW,
        is_remote=draw(st.booleans()),
        left_s=draw(st.sampled_from([None, 60.0])),
        there_gb=draw(st.sampled_from([0, 30])),
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
        assert waits_on_this_machine(waiting, running, [], free=free) == now
        assert waits_on_this_machine(waiting, running, []) == starts, "nobody is there"
    # One that holds a job is not free, and one of another lane is no help.
    assert free_lanes(workers, [long]) == {"servers", "questions"}
    assert waits_on_this_machine(job, [], [], free=free_lanes(workers, [long])) == starts


@settings(suppress_health_check=[HealthCheck.too_slow])  # where others compute, too
@given(queues(), st.integers(0, 6))
def test_the_first_of_a_queue_wait_for_what_each_waits_for(queue: QueueView, most: int) -> None:
    first = in_order(queue.pending)[:most]
    assert queue.first_reasons(most) == {job.id: queue.place(job)[1] for job in first}
    last = {job.id for job in queue.pending[most:]}
    assert queue.reasons(last) == {j.id: queue.place(j)[1] for j in queue.pending if j.id in last}


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
    assert long_queue.read == LONG
    control = {job.id: state_of(long_queue, job, is_remote=False) for job in shown}
    assert states == control and long_queue.read == LONG + 20 * LONG


def test_what_is_due_in_a_long_queue_is_not_read_whole_at_each_look(long_queue: Any) -> None:
    look = DueJobs(long_queue)
    assert len(look()) == LONG
    long_queue.read = 0
    long_queue.submit_job(spec("last"))
    assert "last" in {job.id for job in look()}
    assert long_queue.read < LONG
    due_jobs(long_queue)
    assert long_queue.read > LONG  # the control reads them all


def test_a_short_queue_is_read_whole(tmp_path: Path) -> None:
    with closing(LocalBackend(tmp_path)) as backend:
        look = DueJobs(backend)
        assert look() == []
        backend.submit_job(spec("job-1"))
        backend.submit_job(spec("job-2", after=("job-1",)))
        assert [job.id for job in look()] == [job.id for job in due_jobs(backend)] == ["job-1"]
