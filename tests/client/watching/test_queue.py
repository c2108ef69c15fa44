"""What pending jobs wait for: of one, and of the first of a long queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from openweights.client.watching.queue import QueueView, in_order
from openweights.types import QUESTION_PRIORITY, SERVED, JobRecord, QueueState

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


@given(queues(), st.integers(0, 6))
def test_the_first_of_a_queue_wait_for_what_each_waits_for(queue: QueueView, most: int) -> None:
    first = in_order(queue.pending)[:most]
    assert queue.first_reasons(most) == {job.id: queue.place(job)[1] for job in first}
