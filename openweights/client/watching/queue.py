"""What a pending job waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from openweights.types import SERVED, JobRecord, QueueState

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def waits_for(backend: Backend, job: JobRecord, *, is_remote: bool) -> str:
    """In a few words; empty for a job that does not wait."""
    if job.status != "pending":
        return ""
    return place_in_queue(backend, job, is_remote=is_remote)[1]


def place_in_queue(
    backend: Backend, job: JobRecord, *, is_remote: bool
) -> tuple[list[JobRecord], str]:
    """The jobs that workers take before a pending one, and in a few words what it waits for."""
    running, pending = (
        [other for other in backend.list_jobs(statuses=(status,), limit=None) if other.id != job.id]
        for status in ("in_progress", "pending")
    )
    unfinished = {other.id: other for other in (*pending, *running)}
    if needed := [unfinished[id] for id in job.after if id in unfinished]:
        return [], waits_for_jobs(needed)
    state, now = backend.queue_state(), backend.now()
    if reason := held_back(job, running, state, now):
        return [], reason
    before = [
        other
        for other in pending
        if _rank(other) < _rank(job)
        and unfinished.keys().isdisjoint(other.after)
        and not held_back(other, running, state, now)
    ]
    before = in_order(before)
    if is_remote:
        return before, waits_in_project(job, before)
    return before, waits_on_this_machine(job, running, before)


def in_order(pending: Iterable[JobRecord]) -> list[JobRecord]:
    """As workers take them, the next one first."""
    return sorted(pending, key=_rank)


def _rank(job: JobRecord) -> tuple[int, object, str]:
    """Workers take the least one first."""
    return -job.priority, job.created_at, job.id


def held_back(
    job: JobRecord, running: Sequence[JobRecord], state: QueueState, now: datetime
) -> str:
    """Why no worker may take a job now that waits for no other; empty when one may."""
    if state.paused_at is not None:
        return "for the queue, which is paused: `ow resume`"
    if job.not_before is not None and job.not_before > now:
        why = f"after failure {job.retries}, " if job.retries else ""
        return f"{why}until {job.not_before.astimezone():%Y-%m-%d %H:%M:%S}"
    like_it = [other.id for other in running if other.label == job.label]
    if job.max_running is not None and len(like_it) >= job.max_running:
        return f"for one of {len(like_it)} jobs with the label {job.label} to end"
    return ""


def due_jobs(backend: Backend) -> list[JobRecord]:
    """The pending jobs that some worker could take now."""
    pending = backend.list_jobs(statuses=("pending",), limit=None)
    if not pending:
        return []
    running = backend.list_jobs(statuses=("in_progress",), limit=None)
    state, now = backend.queue_state(), backend.now()
    unfinished = {job.id for job in (*pending, *running)}
    return [
        job
        for job in pending
        if unfinished.isdisjoint(job.after) and not held_back(job, running, state, now)
    ]


def waits_for_jobs(needed: Sequence[JobRecord]) -> str:
    """Those that must complete first."""
    first = needed[0]
    more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
    return f"for {first.id} ({first.status.replace('_', ' ')}){more}"


def waits_on_this_machine(
    job: JobRecord, running: Sequence[JobRecord], before: Sequence[JobRecord]
) -> str:
    """Its worker takes one job after the other, whatever they ask for. A script needs none, and a
    model that is served has one of its own.
    """
    ahead = [other for other in (*running, *before) if other.type not in ("script", SERVED)]
    if not ahead or job.type == SERVED:
        return "for its worker, which is starting"
    more = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
    return f"behind {ahead[0].id}{more}"


def waits_in_project(job: JobRecord, before: Sequence[JobRecord]) -> str:
    """A project's workers are of many kinds: the job needs one that fits."""
    if job.allowed_hardware:
        needs = f"for {' or '.join(job.allowed_hardware)}"
    elif job.requires_vram_gb:
        needs = f"for a worker with {job.requires_vram_gb} GB of GPU memory"
    else:
        needs = "for a worker"
    cloud = job.params.get("cloud_type")
    tier = f" ({cloud})" if cloud else ""
    ahead = f", {len(before)} before it" if before else ""
    return f"{needs}{tier}{ahead}"
