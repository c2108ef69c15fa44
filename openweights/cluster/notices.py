"""What the manager's log is told once, and not every quarter of a minute."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from openweights.cluster.planning.actions import ReportJobs, ReportPod

logger = logging.getLogger(__name__)

SHOWN_IDS = 5


class Notices:
    """Remembers what was told, for as long as it holds."""

    def __init__(self) -> None:
        self._pods: set[str] = set()
        self._jobs: dict[str, set[str]] = {}

    def tell(self, reports: Iterable[ReportJobs | ReportPod]) -> None:
        """Log what is new among the reports of a pass."""
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
                _tell_of_jobs(report)
        self._pods, self._jobs = pods, jobs


def _tell_of_jobs(report: ReportJobs) -> None:
    count = len(report.job_ids)
    ids = ", ".join(report.job_ids[:SHOWN_IDS]) + (", …" if count > SHOWN_IDS else "")
    level = logging.INFO if report.can_wait else logging.ERROR
    waits = "1 job waits" if count == 1 else f"{count} jobs wait"
    logger.log(level, "%s (%s): %s", waits, ids, report.reason)
