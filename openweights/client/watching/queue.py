"""What a pending job waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from openweights.types import JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def waits_for(backend: Backend, job: JobRecord, *, is_remote: bool) -> str:
    """In a few words; empty for a job that does not wait."""
    if job.status != "pending":
        return ""
    running = backend.list_jobs(statuses=("in_progress",), limit=None)
    pending = backend.list_jobs(statuses=("pending",), limit=None)
    unfinished = {other.id: other for other in (*pending, *running)}
    if needed := [unfinished[id] for id in job.after if id in unfinished]:
        return waits_for_jobs(needed)
    before = [
        other
        for other in pending
        if _rank(other) < _rank(job) and unfinished.keys().isdisjoint(other.after)
    ]
    if is_remote:
        return waits_in_project(job, before)
    return waits_on_this_machine(running, in_order(before))


def in_order(pending: Iterable[JobRecord]) -> list[JobRecord]:
    """As workers take them, the next one first."""
    return sorted(pending, key=_rank)


def _rank(job: JobRecord) -> tuple[int, object, str]:
    """Workers take the least one first."""
    return -job.priority, job.created_at, job.id


def waits_for_jobs(needed: Sequence[JobRecord]) -> str:
    """Those that must complete first."""
    first = needed[0]
    more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
    return f"for {first.id} ({first.status.replace('_', ' ')}){more}"


def waits_on_this_machine(running: Sequence[JobRecord], before: Sequence[JobRecord]) -> str:
    """Its worker takes one job after the other, whatever they ask for."""
    ahead = [*(job for job in running if job.type != "script"), *before]
    if not ahead:
        return "its worker is starting"
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
