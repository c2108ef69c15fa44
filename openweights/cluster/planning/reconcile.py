"""Rows against pods: which workers are lost, which pods are left over, which are not ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from openweights.cluster.planning.actions import (
    Action,
    AdoptPod,
    EndWorker,
    ReportPod,
    TerminatePod,
)
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.observation import Pod, Worker, worker_of


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Attributes:
    living: Workers that have not ended, those that are being ended now left out.
    occupied: Slots in use: rows that have not ended, and pods that run without one.
    """

    actions: tuple[Action, ...]
    living: tuple[Worker, ...]
    occupied: int


def reconcile(
    workers: Sequence[Worker], pods: Sequence[Pod] | None, limits: Limits, now: datetime
) -> Reconciled:
    """Compare what the store and the provider know.

    Args:
        pods: None when they could not be listed; then no pod is judged to be gone.
    """
    owned, foreign = _assign(workers, pods or ())
    actions: list[Action] = []
    living: list[Worker] = []
    running = 0
    for worker in workers:
        own = owned.get(worker.id, [])
        if worker.status == "terminated":
            actions += _leftovers(worker, own)
            running += sum(pod.is_running for pod in own)
            continue
        chosen = _chosen(worker, own)
        end = _judged(worker, chosen, limits, now, is_listed=pods is not None)
        if end is not None:
            actions.append(end)
            actions += [TerminatePod(pod.id, worker.id, end.reason) for pod in own]
        else:
            living.append(worker)
            actions += _kept(worker, chosen, own)
        running += worker.is_managed + sum(pod.is_running for pod in own if pod is not chosen)
    actions += [ReportPod(pod.id, pod.name) for pod in foreign]
    return Reconciled(tuple(actions), tuple(living), running)


def is_silent(worker: Worker, limits: Limits, now: datetime) -> bool:
    """Whether a worker is to be taken for lost: no heartbeat, and no growing log either, or no
    heartbeat for so long that a growing log does not count any more.
    """
    silence = now - worker.pinged_at
    if silence <= timedelta(seconds=limits.unresponsive_s):
        return False
    if silence > timedelta(seconds=limits.silent_limit_s) or worker.log_grew_at is None:
        return True
    return now - worker.log_grew_at > timedelta(seconds=limits.unresponsive_s)


# ---- whose pod -----------------------------------------------------------------------------------


def _assign(
    workers: Sequence[Worker], pods: Iterable[Pod]
) -> tuple[dict[str, list[Pod]], list[Pod]]:
    """Pods by worker id, and those that no row names.

    A row that has not ended comes before one that has: what somebody may still be using is never
    taken for a leftover. Workers on machines of their own have no pods that are ours to end.
    """
    by_id = {worker.id: worker for worker in workers}
    by_pod: dict[str, Worker] = {}
    for worker in workers:
        if worker.pod_id and (worker.status != "terminated" or worker.pod_id not in by_pod):
            by_pod[worker.pod_id] = worker
    owned: dict[str, list[Pod]] = {}
    foreign: list[Pod] = []
    for pod in sorted(pods, key=lambda pod: pod.id):
        if pod.status == "TERMINATED":
            continue
        named = [by_pod.get(pod.id), by_id.get(worker_of(pod.name) or "")]
        rows = [worker for worker in named if worker is not None]
        owner = next((row for row in rows if row.status != "terminated"), rows[0] if rows else None)
        if owner is None:
            foreign.append(pod)
        elif owner.is_managed:
            owned.setdefault(owner.id, []).append(pod)
    return owned, foreign


def _chosen(worker: Worker, own: list[Pod]) -> Pod | None:
    """The worker's pod; one of its name when the row's own is not there."""
    recorded = next((pod for pod in own if pod.id == worker.pod_id), None)
    if recorded is not None:
        return recorded
    return next((pod for pod in own if pod.is_running), own[0] if own else None)


def _kept(worker: Worker, chosen: Pod | None, own: list[Pod]) -> list[Action]:
    actions: list[Action] = []
    if chosen is not None and chosen.id != worker.pod_id:
        actions.append(AdoptPod(worker.id, chosen.id, chosen.usd_per_hour))
    reason = "its worker has another pod"
    actions += [
        TerminatePod(pod.id, worker.id, reason, is_surplus=True) for pod in own if pod is not chosen
    ]
    return actions


def _leftovers(worker: Worker, own: list[Pod]) -> list[Action]:
    is_boot_failure = not worker.has_worked and worker.stopping_since is None
    return [TerminatePod(pod.id, worker.id, "its worker has ended", is_boot_failure) for pod in own]


# ---- who is lost ---------------------------------------------------------------------------------


def _judged(
    worker: Worker, pod: Pod | None, limits: Limits, now: datetime, *, is_listed: bool
) -> EndWorker | None:
    if not worker.is_managed:
        return None
    if worker.status == "starting":
        reason = _why_not_started(worker, pod, limits, now, is_listed=is_listed)
        has_had_pod = pod is not None or worker.pod_id is not None
        return EndWorker(worker.id, reason, is_boot_failure=has_had_pod) if reason else None
    reason = _why_lost(worker, pod, limits, now, is_listed=is_listed)
    return EndWorker(worker.id, reason, is_boot_failure=not worker.has_worked) if reason else None


def _why_not_started(
    worker: Worker, pod: Pod | None, limits: Limits, now: datetime, *, is_listed: bool
) -> str:
    age = now - worker.created_at
    if age > timedelta(seconds=limits.startup_s):
        return f"it has not come up in {limits.startup_s:.0f} s"
    if not is_listed:
        return ""
    if pod is not None:
        return "" if pod.is_running else "its pod ended before it came up"
    if worker.pod_id is None and age > timedelta(seconds=limits.row_s):
        return f"no pod was started for it in {limits.row_s:.0f} s"
    if worker.pod_id is not None and age > timedelta(seconds=limits.missing_pod_s):
        return "its pod is gone before it came up"
    return ""


def _why_lost(
    worker: Worker, pod: Pod | None, limits: Limits, now: datetime, *, is_listed: bool
) -> str:
    silence = now - worker.pinged_at
    stopping_since = worker.stopping_since
    is_gone = is_listed and worker.pod_id is not None and (pod is None or not pod.is_running)
    if is_gone and silence > timedelta(seconds=limits.missing_pod_s):
        return "its pod is gone"
    if is_silent(worker, limits, now):
        return f"nothing was heard of it for {silence.total_seconds():.0f} s"
    if stopping_since and now - stopping_since > timedelta(seconds=limits.stopping_s):
        return f"it did not end within {limits.stopping_s:.0f} s of being asked to"
    return ""
