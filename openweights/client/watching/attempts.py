"""What is said of a job that begins again: why, and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openweights.client.event_json import as_number
from openweights.events import Checkpoint
from openweights.types import ENDED, JobRecord, RunRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def begins_again(backend: Backend, job: JobRecord) -> str:
    """As in `worker worker-1 is gone; attempt 2, from step 40`; empty for a first attempt, and for
    a job that has ended.
    """
    attempt = job.attempts + (job.status == "pending")
    if attempt <= 1 or job.status in ENDED:
        return ""
    runs = backend.list_runs(job_id=job.id, limit=2)
    before = next((run for run in reversed(runs) if run.attempt < attempt), None)
    trains = job.type == "fine-tuning"
    return again_words(attempt, before, last_checkpoint(backend, job.id) if trains else None)


def again_words(attempt: int, before: RunRecord | None, from_step: int | None) -> str:
    """What a run comes after, the how manieth it is, and where it begins.

    Args:
        before: The run before it. Why it ended is said if it did not end by itself.
        from_step: That of the last checkpoint, 0 without one; None for a job that keeps none.
    """
    was_ended = before is not None and before.status == "failed" and before.exit_code is None
    why = before.error if before is not None and was_ended else None
    words = f"attempt {attempt}"
    if from_step is not None:
        words += f", from step {from_step}" if from_step else ", from step 0 (no checkpoint yet)"
    return "; ".join(filter(None, (why, words)))


def last_checkpoint(backend: Backend, job_id: str) -> int:
    """The step that a training goes on from; 0 without a checkpoint."""
    step = 0
    for event in backend.list_events(job_id=job_id, type=Checkpoint.type):
        step = int(as_number(event.data.get("step")) or 0)
    return step
