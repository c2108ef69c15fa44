"""Which workers are asked to end: idle ones, and those that make room for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from openweights.cluster.planning.actions import StopWorker
from openweights.cluster.planning.fit import Group
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.matching import Wanted
from openweights.cluster.planning.observation import Demand, Worker


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker of ours that runs nothing.

    Attributes:
        is_spare: No waiting job is reserved for it.
        oldest_since: Since when the oldest job that it could take waits, for a worker that is not
            spare and has been idle for too long.
    """

    worker: Worker
    is_spare: bool
    oldest_since: datetime | None

    @property
    def since(self) -> datetime:
        """When it became idle."""
        return self.worker.idle_since or self.worker.created_at


def stop_idle(idle: Sequence[Idle], limits: Limits, now: datetime) -> list[StopWorker]:
    """Those that have been idle for too long.

    One for which there is work is given time to take it, but not without end: what keeps it from
    its job is not known here, and it is paid for.
    """
    stops: list[StopWorker] = []
    for entry in idle:
        idle_s = (now - entry.since).total_seconds()
        if idle_s < limits.idle_s:
            continue
        if entry.is_spare:
            stops.append(_stop(entry.worker, f"idle for {idle_s:.0f} s"))
            continue
        oldest_since = entry.oldest_since or now
        is_late = now - max(oldest_since, entry.since) >= timedelta(seconds=limits.claim_s)
        if is_late or idle_s >= 2 * limits.idle_s:
            reason = f"idle for {idle_s:.0f} s beside a job that it could take"
            stops.append(StopWorker(entry.worker.id, reason, is_faulty=True))
    return stops


def make_room(idle: Sequence[Idle], wanted: int) -> list[StopWorker]:
    """Spare workers whose slots others need, those that are idle for longest first."""
    spare = sorted((entry for entry in idle if entry.is_spare), key=lambda entry: entry.since)
    return [
        _stop(entry.worker, "its slot is needed for other work")
        for entry in spare[: max(0, wanted)]
    ]


def rotate(
    starved: Sequence[Wanted],
    living: Sequence[Worker],
    limits: Limits,
    now: datetime,
    *,
    freed: int,
) -> list[StopWorker]:
    """Busy workers that give up a job which they have taken since others began to wait.

    Every slot may be held by workers of one group that find work without end, while a job of
    another group waits. A worker that took a job after that one had come has its job handed back
    (it goes on elsewhere from its checkpoint); runs that are older are left alone.

    Args:
        starved: Demands without a slot that no living worker can take, the first in turn first.
        freed: Slots that become free anyway.
    """
    first: dict[Group, Demand] = {}
    for demand, need in starved:
        first.setdefault(need.group, demand)
    settled = [worker for worker in living if _may_rotate(worker, limits, now)]
    youngest = sorted(settled, key=lambda worker: worker.run_started_at or now, reverse=True)
    stops: list[StopWorker] = []
    for demand in list(first.values())[max(0, freed) :]:
        victim = next((worker for worker in youngest if _gives_way(worker, demand)), None)
        if victim is not None:
            youngest.remove(victim)
            reason = f"makes room for {demand.id}, which was there before its job was taken"
            stops.append(StopWorker(victim.id, reason))
    return stops


def _stop(worker: Worker, reason: str) -> StopWorker:
    """Of a worker without work. One that has never had any was rented in vain: a job may have gone
    elsewhere, but where that happens again and again, its workers cannot take what they come for.
    """
    return StopWorker(worker.id, reason, is_faulty=not worker.has_worked)


def _may_rotate(worker: Worker, limits: Limits, now: datetime) -> bool:
    return (
        worker.is_managed
        and worker.status == "active"
        and worker.job is not None
        and worker.run_started_at is not None
        and now - worker.created_at >= timedelta(seconds=limits.rotate_s)
    )


def _gives_way(worker: Worker, demand: Demand) -> bool:
    job = worker.job
    started_at = worker.run_started_at
    return (
        job is not None
        and started_at is not None
        and started_at > demand.waiting_since
        and job.priority <= demand.priority
    )
