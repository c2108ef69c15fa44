"""The seam between the cluster manager and the places where workers run.

Every provider implements `Pods`. A pod is a machine, or a process, that runs one worker; it is
named after its worker's row in the store, and by that name it is found again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from openweights.cluster.planning.market import Listing
from openweights.cluster.planning.observation import Pod, PodCloud, pod_name
from openweights.errors import PlatformError
from openweights.gpu_catalogue import CATALOGUE, Offer
from openweights.types import SERVED_PORT, WorkerSpec

TTL_HOURS = 24
NOTICE_S = 5  # RunPod's, from SIGTERM to SIGKILL
# Of a worker that no manager looks after any more: far longer than a manager leaves one idle.
LONELY_S = 1800


@dataclass(frozen=True, slots=True)
class PodRequest:
    """A pod to be started.

    Attributes:
        gpu_id: The provider's name for the GPU; None for a small pod without one.
        cloud: Tier; one of the two, never ALL: that is two attempts.
        env: Environment of the pod's process. Not shown: it holds the worker's key.
        usd_per_hour: What it should cost, for as long as the provider does not say.
        disk_gb: Disk of the container.
        ports: Such as "8000/http", "22/tcp".
    """

    name: str
    image: str
    gpu_id: str | None
    gpu_count: int
    cloud: PodCloud
    env: Mapping[str, str] = field(repr=False)
    usd_per_hour: float | None = None
    disk_gb: int = 200
    ports: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Machines:
    """What is asked of a pod's machine beside its GPUs.

    Attributes:
        vcpus_per_gpu, memory_gb_per_gpu: At least so many for each GPU: a tokenizer, or a merge in
            main memory, is slow or killed on less.
        data_centers: Tried in this order; empty for any.
    """

    vcpus_per_gpu: int = 4
    memory_gb_per_gpu: int = 16
    data_centers: tuple[str, ...] = ()

    def places(self, request: PodRequest) -> tuple[str | None, ...]:
        """The data centres to try for a pod; one without a GPU is small enough for any."""
        return (None,) if request.gpu_id is None else self.data_centers or (None,)


def row_of(worker_id: str, image: str, offer: Offer) -> WorkerSpec:
    """What is written before the pod is asked for."""
    return WorkerSpec(
        worker_id,
        docker_image=image,
        hardware_type=offer.hardware_type,
        gpu_count=offer.gpu_count,
        vram_gb=offer.gpu_count * CATALOGUE[offer.gpu_key].vram_gb,
        cloud_type=offer.cloud,
    )


def request_of(
    worker_id: str, image: str, offer: Offer, common_env: Mapping[str, str], api_key: str
) -> PodRequest:
    """The pod of a worker.

    Args:
        common_env: What every worker's process needs.
        api_key: Good for this worker alone.
    """
    env = {
        **common_env,
        "WORKER_ID": worker_id,
        "DOCKER_IMAGE": image,
        "TTL_HOURS": str(TTL_HOURS),
        "OPENWEIGHTS_NOTICE_S": str(NOTICE_S),
        "OPENWEIGHTS_WORKER_IDLE_S": str(LONELY_S),
        "OPENWEIGHTS_API_KEY": api_key,
        "OPENWEIGHTS_CLOUD_TYPE": offer.cloud,
    }
    return PodRequest(
        name=pod_name(worker_id),
        image=image,
        gpu_id=offer.gpu_id,
        gpu_count=offer.gpu_count,
        cloud=offer.cloud,
        env=env,
        usd_per_hour=offer.usd_per_hour,
        ports=(f"{SERVED_PORT}/http",),
    )


class Pods(Protocol):
    """A place where pods run. All verbs raise `PodsUnavailable` when it cannot be reached,
    `RateLimited` when it asks to be left alone, and `ConfigurationError` when it refuses the key.
    """

    name: str

    def start(self, request: PodRequest) -> Pod:
        """Start the pod of that name, or return the one that has it already.

        Raises:
            NoCapacity: There is no such machine now; nothing was started.
            SpendingLimit: The account may not spend more; nothing was started.
            PodRefused: The request is not acceptable, whenever it is made; nothing was started.
            OutcomeUnknown: The answer was lost. The pod may appear in `list_pods` later.
        """
        ...

    def list_pods(self) -> list[Pod]:
        """Every pod of the account, also those of others."""
        ...

    def terminate(self, pod_id: str, name: str) -> None:
        """End a pod and what it costs. One that is gone is no error.

        Raises:
            PodRefused: The pod of that id has another name: it is somebody else's.
        """
        ...

    def logs(self, pod_id: str) -> str:
        """The last lines that the pod has printed; empty when there are none."""
        ...

    def stock(self) -> list[Listing]:
        """What is to be had of which GPU on which tier, and its price; empty where nothing is
        sold.
        """
        ...


class PodsUnavailable(PlatformError):
    """The provider cannot be reached or fails; trying again may work."""


class RateLimited(PodsUnavailable):
    """The provider wants no calls for `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCapacity(PlatformError):
    """No such machine is free."""


class SpendingLimit(PlatformError):
    """The account has no money left, or may spend no more."""


class PodRefused(PlatformError):
    """The provider will not do this, however often it is asked."""


class OutcomeUnknown(PlatformError):
    """A pod may or may not have been started."""
