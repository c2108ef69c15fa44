"""What the manager remembers between two passes: since when workers are idle, silent or ending, and
what its log has been told.

Only memory: after a restart the clocks begin anew, which delays an end and never hastens one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from openweights.cluster.planning.actions import ReportJobs, ReportPod
from openweights.cluster.planning.observation import Demand, Pod, PodCloud, Worker, pod_name
from openweights.types import JobRecord, PendingRow, WorkerRow

logger = logging.getLogger(__name__)

_SHOWN_IDS = 5
# A worker that is silent for longer has the log of its run looked at.
LOOK_AT_LOG_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class _Log:
    run_id: int
    size: int
    grew_at: datetime | None


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the world; `pods` is None when they could not be listed."""

    now: datetime
    jobs: Sequence[Demand]
    workers: Sequence[Worker]
    pods: Sequence[Pod] | None
    gone: Sequence[str] = ()
    """Ended workers whose pods are gone, which the store does not know yet."""


class Watch:
    """Makes the planner's workers of rows.

    Args:
        log_size: Id of the run in progress of a worker, and bytes of its log; None without one.
        provider: Whose pods are listed. Workers of another one are another manager's to end.
    """

    def __init__(self, log_size: Callable[[str], tuple[int, int] | None], provider: str) -> None:
        self._log_size = log_size
        self._provider = provider
        self._idle_since: dict[str, datetime] = {}
        self._stopping_since: dict[str, datetime] = {}
        self._logs: dict[str, _Log] = {}
        self._worked: set[str] = set()
        self._heard_from: datetime | None = None
        # By job: who submitted it, told while it waits and wanted while it runs.
        self._owners: dict[str, str] = {}

    def store_was_away(self) -> None:
        """From now on nobody counts as silent for longer than the store has been back."""
        self._heard_from = None

    def see(
        self,
        now: datetime,
        pods: Sequence[Pod] | None,
        rows: Sequence[WorkerRow],
        pending: Sequence[PendingRow],
        running: Sequence[JobRecord],
    ) -> Seen:
        """Put together what was read. Of ended workers the planner gets those with a listed pod."""
        taken = {job.id for job in running}
        self._owners = {job: owner for job, owner in self._owners.items() if job in taken}
        self._owners |= {row.job.id: row.owner for row in pending}
        jobs = [
            Demand.of(row.job, owner=row.owner, usd_left=row.usd_left)
            for row in pending
            if row.job.id not in taken
        ]
        ids, names = {pod.id for pod in pods or ()}, {pod.name for pod in pods or ()}
        shown: list[WorkerRow] = []
        gone: list[str] = []
        for row in rows:
            if row.status != "terminated" or row.pod_id in ids or pod_name(row.id) in names:
                shown.append(row)
            elif pods is not None and row.provider == self._provider:
                gone.append(row.id)
        return Seen(now, jobs, self._workers(shown, running, now), pods, gone)

    def _workers(
        self, rows: Sequence[WorkerRow], running: Sequence[JobRecord], now: datetime
    ) -> list[Worker]:
        """The rows with what is remembered; forgets workers and jobs that are not among them."""
        self._heard_from = self._heard_from or now
        held = {job.worker_id: job for job in running if job.worker_id is not None}
        workers = [self._worker(row, held.get(row.id), now) for row in rows]
        self._forget({row.id for row in rows})
        return workers

    def _worker(self, row: WorkerRow, job: JobRecord | None, now: datetime) -> Worker:
        heard_at = max(row.pinged_at, self._heard_from or row.pinged_at)
        if row.status == "active" and job is None:
            self._idle_since.setdefault(row.id, now)
        else:
            self._idle_since.pop(row.id, None)
        if job is not None:
            self._worked.add(row.id)
        if row.status == "shutdown":
            self._stopping_since.setdefault(row.id, now)
        cloud_type: PodCloud | None = None if row.cloud_type in (None, "ALL") else row.cloud_type
        return Worker(
            id=row.id,
            status=row.status,
            docker_image=row.docker_image,
            hardware_type=row.hardware_type,
            created_at=row.created_at,
            pinged_at=heard_at,
            vram_gb=0 if row.status == "starting" else row.vram_gb,
            cloud_type=cloud_type,
            pod_id=row.pod_id,
            usd_per_hour=row.price_usd_per_hour,
            is_managed=row.provider == self._provider,
            job=None if job is None else Demand.of(job, owner=self._owners.get(job.id, "")),
            has_worked=row.id in self._worked,
            run_started_at=None if job is None else job.updated_at,
            idle_since=self._idle_since.get(row.id),
            log_grew_at=None if job is None else self._log_grew_at(row.id, heard_at, now),
            stopping_since=self._stopping_since.get(row.id),
        )

    def _log_grew_at(self, worker_id: str, heard_at: datetime, now: datetime) -> datetime | None:
        """Looked at only when the worker is silent: a log that grows is a sign of life, too."""
        if now - heard_at < timedelta(seconds=LOOK_AT_LOG_AFTER_S):
            self._logs.pop(worker_id, None)
            return None
        found = self._log_size(worker_id)
        if found is None:
            return None
        run_id, size = found
        before = self._logs.get(worker_id)
        grew_at = None
        if before is not None and before.run_id == run_id:
            grew_at = now if size > before.size else before.grew_at
        self._logs[worker_id] = _Log(run_id, size, grew_at)
        return grew_at

    def _forget(self, workers: set[str]) -> None:
        for memory in (self._idle_since, self._stopping_since, self._logs):
            for worker_id in memory.keys() - workers:
                del memory[worker_id]
        self._worked &= workers


class ReportLog:
    """Logs what is new among the reports of a pass, and not the same every quarter of a minute."""

    def __init__(self) -> None:
        self._pods: set[str] = set()
        self._jobs: dict[str, set[str]] = {}

    def write(self, reports: Iterable[ReportJobs | ReportPod]) -> None:
        """Log what was not among the reports of the pass before."""
        pods: set[str] = set()
        jobs: dict[str, set[str]] = {}
        for report in reports:
            if isinstance(report, ReportPod):
                pods.add(report.pod_id)
                if report.pod_id not in self._pods:
                    logger.info("pod %s (%s) is not ours: left alone", report.pod_id, report.name)
                continue
            jobs.setdefault(report.reason, set()).update(report.job_ids)
            if set(report.job_ids) - self._jobs.get(report.reason, set()):
                _log_jobs(report)
        self._pods, self._jobs = pods, jobs


def _log_jobs(report: ReportJobs) -> None:
    count = len(report.job_ids)
    ids = ", ".join(report.job_ids[:_SHOWN_IDS]) + (", …" if count > _SHOWN_IDS else "")
    level = logging.INFO if report.can_wait else logging.ERROR
    waits = "1 job waits" if count == 1 else f"{count} jobs wait"
    logger.log(level, "%s (%s): %s", waits, ids, report.reason)
