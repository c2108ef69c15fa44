"""A worker's row, and the pod that is asked for with it."""

from __future__ import annotations

from collections.abc import Mapping

from openweights.cluster.planning.catalogue import CATALOGUE, Offer
from openweights.cluster.planning.observation import pod_name
from openweights.cluster.pods.base import PodRequest
from openweights.types import WorkerSpec

TTL_HOURS = 24
NOTICE_S = 5  # RunPod's, from SIGTERM to SIGKILL
# Of a worker that no manager looks after any more: far longer than a manager leaves one idle.
LONELY_S = 1800


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
    )
