"""Pods that somebody works in over SSH. No row names them, so no manager touches them: whoever
starts one ends it.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from openweights.cluster.planning.hardware import parse_hardware
from openweights.cluster.planning.observation import Pod, PodCloud
from openweights.cluster.pods.base import PodRequest, PodsUnavailable
from openweights.cluster.pods.runpod import RunPod
from openweights.errors import InvalidInputError, PlatformError
from openweights.gpu_catalogue import CATALOGUE

PREFIX = "owdev-"
READY_S = 900.0
POLL_S = 5.0
END_TRIES = 3
END_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Wish:
    """A development pod.

    Attributes:
        hardware: Such as "1x L40S".
        public_key: Who may log in, as in `id_ed25519.pub`.
    """

    hardware: str
    cloud: PodCloud
    image: str
    public_key: str
    disk_gb: int = 200


def request_of(wish: Wish) -> PodRequest:
    """The pod to ask for; its name is new.

    Raises:
        InvalidInputError: The hardware is not known.
    """
    count, key = parse_hardware(wish.hardware)
    gpu = CATALOGUE[key]
    usd = gpu.usd(wish.cloud)
    return PodRequest(
        name=f"{PREFIX}{uuid.uuid4().hex[:8]}",
        image=wish.image,
        gpu_id=gpu.gpu_id,
        gpu_count=count,
        cloud=wish.cloud,
        env={"PUBLIC_KEY": wish.public_key},
        usd_per_hour=None if usd is None else usd * count,
        disk_gb=wish.disk_gb,
        ports=("22/tcp",),
    )


def list_pods(runpod: RunPod) -> list[Pod]:
    """Development pods of the account."""
    return [pod for pod in runpod.list_pods() if pod.name.startswith(PREFIX)]


def wait_for_address(
    runpod: RunPod, pod: Pod, *, give_up_s: float = READY_S, poll_s: float = POLL_S
) -> tuple[str, int]:
    """Host and port of its SSH server.

    Raises:
        PlatformError: It did not come up in time.
    """
    give_up_at = time.monotonic() + give_up_s
    while time.monotonic() < give_up_at:
        try:
            address = runpod.address(pod.id)
        except PodsUnavailable:
            address = None
        if address is not None:
            return address
        time.sleep(poll_s)
    raise PlatformError(f"pod {pod.name} was not reachable within {give_up_s / 60:.0f} minutes")


def end(runpod: RunPod, name: str, *, may_appear: bool = False) -> bool:
    """End the pod of that name, and make sure that it is gone; False if there was none.

    Args:
        may_appear: Its start was not answered: it may be listed only later.

    Raises:
        InvalidInputError: It is no development pod's name.
        PlatformError: It may still run; whoever asked has to be told.
    """
    if not name.startswith(PREFIX):
        raise InvalidInputError(f"{name!r} is no development pod; they begin with {PREFIX}")
    reason = "it is still listed"
    was_there = False
    for number in range(END_TRIES):
        if number > 0:
            time.sleep(END_PAUSE_S)
        try:
            for pod in runpod.list_pods():
                if pod.name == name:
                    was_there = True
                    runpod.terminate(pod.id, name)
            is_gone = all(pod.name != name for pod in runpod.list_pods())
            if is_gone and (not may_appear or number == END_TRIES - 1):
                return was_there
        except PodsUnavailable as error:
            reason = str(error)
    raise PlatformError(f"pod {name} could not be ended: {reason}")
