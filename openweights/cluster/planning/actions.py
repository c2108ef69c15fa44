"""What the planner wants done. Each action may be applied twice, or after a crash half-way."""

from __future__ import annotations

from dataclasses import dataclass

from openweights.gpu_catalogue import Offer


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Write a worker's row, then ask for its pod.

    Attributes:
        offers: To be tried in this order, until one gives a pod.
        job_id: The job that it is started for; it may get another one.
    """

    image: str
    offers: tuple[Offer, ...]
    job_id: str


@dataclass(frozen=True, slots=True)
class AdoptPod:
    """The pod bears the name of a worker whose row knows no pod: its creation was answered to
    nobody. Write it into the row.
    """

    worker_id: str
    pod_id: str
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ask a worker to end.

    Attributes:
        is_faulty: It has taken no job though one fits it, or has never had one: count that as a
            failed boot.
    """

    worker_id: str
    reason: str
    is_faulty: bool = False


@dataclass(frozen=True, slots=True)
class EndWorker:
    """Record that a worker has ended; a job that it held is pending again by that.

    Attributes:
        is_boot_failure: It has never held a job: count that against its hardware and image, once
            per worker.
    """

    worker_id: str
    reason: str
    is_boot_failure: bool = False


@dataclass(frozen=True, slots=True)
class TerminatePod:
    """End a pod whose worker's row has ended, or one too many.

    Attributes:
        is_surplus: Its worker lives on, in another pod: the row stays as it is.
        is_boot_failure: As in `EndWorker`: its worker ended by itself without having held a job.
    """

    pod_id: str
    worker_id: str
    reason: str
    is_boot_failure: bool = False
    is_surplus: bool = False


@dataclass(frozen=True, slots=True)
class ReportPod:
    """No row names this pod, so it is somebody else's: say so, and leave it alone."""

    pod_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ReportJobs:
    """No pod can be started for these jobs.

    Attributes:
        can_wait: False when nothing will ever fit them as they are.
    """

    job_ids: tuple[str, ...]
    reason: str
    can_wait: bool


Action = StartWorker | AdoptPod | StopWorker | EndWorker | TerminatePod | ReportPod | ReportJobs
