"""What the manager has seen, as the planner takes it: jobs that wait, workers, pods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, cast

from openweights.gpu_catalogue import PodCloud
from openweights.types import CLOUD_TYPES, CloudType, JobRecord, WorkerStatus

PodStatus = Literal["PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR", "TERMINATED"]

POD_PREFIX = "ow-"
# Images of workers that take jobs of every image, as `claim_job` does.
ANY_IMAGE = frozenset({"", "dev"})


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job asks of a worker.

    Attributes:
        waiting_since: When the job became pending.
        owner: The key or user who submitted it; owners get equal shares of the workers.
        usd_left: What may still be spent on it; None for no limit.
        max_usd_per_hour: Of its pod; None for no limit.
    """

    id: str
    docker_image: str
    waiting_since: datetime
    cloud_type: CloudType = "SECURE"
    requires_vram_gb: int = 0
    allowed_hardware: tuple[str, ...] | None = None
    priority: int = 0
    owner: str = ""
    usd_left: float | None = None
    max_usd_per_hour: float | None = None

    @classmethod
    def of(cls, job: JobRecord, *, owner: str = "", usd_left: float | None = None) -> Demand:
        """Of a stored job. What is no cloud type, or no parameters, counts as SECURE: a row that no
        client has written keeps nobody from the others.
        """
        params = cast("object", job.params)
        cloud_type = job.params.get("cloud_type") if isinstance(params, Mapping) else None
        return cls(
            job.id,
            job.docker_image,
            job.updated_at,
            cloud_type if cloud_type in CLOUD_TYPES else "SECURE",
            job.requires_vram_gb,
            job.allowed_hardware,
            job.priority,
            owner,
            usd_left,
            job.max_usd_per_hour,
        )


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's row, and what the manager knows besides.

    Attributes:
        vram_gb: Of all its GPUs, as it said itself; 0 while it is starting.
        usd_per_hour: Price of its pod; None when it is not known.
        is_managed: The cluster made its pod. Others, on somebody's own machine, take jobs but are
            never stopped and need no slot.
        job: What it is running.
        has_worked: It has held a job, now or before.
        idle_since: When its last run ended, else when it became active; None while it is busy or
            starting.
        log_grew_at: When the log of its run was last seen to grow.
        stopping_since: When it was first seen to be asked to end.
    """

    id: str
    status: WorkerStatus
    docker_image: str
    hardware_type: str
    created_at: datetime
    pinged_at: datetime
    vram_gb: int = 0
    cloud_type: PodCloud | None = None
    pod_id: str | None = None
    usd_per_hour: float | None = None
    is_managed: bool = True
    job: Demand | None = None
    has_worked: bool = False
    run_started_at: datetime | None = None
    idle_since: datetime | None = None
    log_grew_at: datetime | None = None
    stopping_since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of the account, perhaps somebody else's.

    Attributes:
        usd_per_hour: Of the whole pod; None when the provider has not said.
    """

    id: str
    name: str
    status: PodStatus
    usd_per_hour: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether it runs or is about to, and so may hold a worker."""
        return self.status in ("PROVISIONING", "STARTING", "RUNNING")


def pod_name(worker_id: str) -> str:
    """The name of a worker's pod, by which it is found again."""
    return f"{POD_PREFIX}{worker_id}"


def worker_of(name: str) -> str | None:
    """The worker id that a pod's name holds; None for a name that is not ours."""
    return name.removeprefix(POD_PREFIX) if name.startswith(POD_PREFIX) else None
