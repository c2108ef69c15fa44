"""The GPUs that can be rented, and what they cost.

Prices are only where everything starts from: the provider's own answers replace them
(`Market.restocked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType
from typing import Literal

from openweights.gpu_names import LONG_NAMES
from openweights.types import CloudType

# Tier of a pod; a job's ALL is two of them.
PodCloud = Literal["SECURE", "COMMUNITY"]

CLOUDS: tuple[PodCloud, ...] = ("SECURE", "COMMUNITY")
# Sizes of pods that are chosen without being named; a host has eight GPUs at most.
GPU_COUNTS = (1, 2, 4, 8)
# Of each GPU's memory, what the driver and the rounding of its size may keep from a job.
MARGIN_GB = 5


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU type of the catalogue.

    Attributes:
        key: Short name, as in hardware strings.
        gpu_id: RunPod's name for it, which is also `nvidia-smi`'s.
        vram_gb: Memory of one, as sold.
        secure_usd: Price of one per hour on the SECURE tier; None where it was not on offer.
        community_usd: The same, COMMUNITY.
        seen_on: When the prices were seen.
        is_automatic: May be chosen for a job that names no hardware: training was seen to work on
            it.
    """

    key: str
    gpu_id: str
    vram_gb: int
    secure_usd: float | None
    community_usd: float | None
    seen_on: date
    is_automatic: bool = False

    def usd(self, cloud: PodCloud) -> float | None:
        """Price of one per hour on a tier, or None."""
        return self.secure_usd if cloud == "SECURE" else self.community_usd


@dataclass(frozen=True, slots=True)
class Offer:
    """A pod that could be asked for.

    Attributes:
        gpu_key: Key in the catalogue.
        gpu_id: RunPod's name for the GPU.
        usd_per_hour: Of the whole pod.
        vram_gb: What a job can surely use, of all its GPUs together.
    """

    gpu_key: str
    gpu_id: str
    gpu_count: int
    cloud: PodCloud
    usd_per_hour: float
    vram_gb: int

    @property
    def hardware_type(self) -> str:
        """Such as "2x A100S"."""
        return f"{self.gpu_count}x {self.gpu_key}"


def clouds_of(cloud_type: CloudType) -> Sequence[PodCloud]:
    """The tiers that a job may run on."""
    return CLOUDS if cloud_type == "ALL" else (cloud_type,)


def make_offers(
    gpus: Iterable[Gpu], count: int, cloud_type: CloudType, usable_gb: Callable[[Gpu], int]
) -> list[Offer]:
    """Pods with so many of each GPU, on each tier on which it is to be had."""
    return [
        Offer(gpu.key, gpu.gpu_id, count, cloud, round(count * usd, 4), count * usable_gb(gpu))
        for gpu in gpus
        for cloud in clouds_of(cloud_type)
        if (usd := gpu.usd(cloud)) is not None
    ]


def fitting_offers(
    gpus: Iterable[Gpu], vram_gb: int, cloud_type: CloudType, usable_gb: Callable[[Gpu], int]
) -> list[Offer]:
    """For a job that names no hardware: pods of the fewest GPUs that have the memory, since not
    every job can spread over several.
    """
    automatic = [gpu for gpu in gpus if gpu.is_automatic]
    for count in GPU_COUNTS:
        offers = make_offers(automatic, count, cloud_type, usable_gb)
        if fitting := [offer for offer in offers if offer.vram_gb >= vram_gb]:
            return fitting
    return []


def surely_usable_gb(gpu: Gpu) -> int:
    """Memory of one GPU that a job can surely use."""
    return gpu.vram_gb - MARGIN_GB


# Both tiers: RunPod's page of that day. Later rows without a COMMUNITY price were not looked up.
_NOVEMBER = date(2026, 11, 9)
_OCTOBER = date(2026, 10, 7)
_MARCH = date(2026, 3, 10)
_ROWS: tuple[tuple[str, int, float | None, float | None, date, bool], ...] = (
    ("A100", 80, 1.79, 1.19, _NOVEMBER, True),
    ("A100S", 80, 1.79, 1.39, _NOVEMBER, True),
    ("H100", 80, 2.89, 1.99, _NOVEMBER, False),
    ("H100N", 94, 3.19, 2.59, _NOVEMBER, True),
    ("H100S", 80, 3.99, 2.69, _NOVEMBER, True),
    ("H200", 141, 4.59, 3.59, _OCTOBER, True),
    ("B200", 180, 6.79, 5.98, _OCTOBER, False),
    ("RTX3090", 24, 0.46, 0.22, _MARCH, True),
    ("RTX4090", 24, 0.69, 0.34, _MARCH, False),
    ("L40", 48, 0.99, 0.69, _MARCH, False),
    ("L40S", 48, 0.86, 0.79, _MARCH, False),
    ("A40", 48, 0.44, None, _MARCH, True),
    ("6000ADA", 48, 0.77, None, _MARCH, True),
    ("A4500", 20, 0.32, None, _MARCH, True),
    ("A6000", 48, 0.49, None, _MARCH, False),
    ("A2000", 6, 0.20, None, _MARCH, False),
    ("A4000", 16, 0.28, None, _MARCH, False),
    ("A4000_SFF", 20, 0.36, None, _MARCH, False),
    ("A5000", 24, 0.27, None, _MARCH, False),
    ("A5000_ADA", 32, 1.02, None, _MARCH, False),
    ("A30", 24, 1.05, None, _MARCH, False),
    ("2000ADA", 16, 0.29, None, _MARCH, False),
    ("4000ADA", 20, 0.48, None, _MARCH, False),
    ("L4", 24, 0.39, None, _MARCH, False),
    ("RTX3070", 8, 0.30, None, _MARCH, False),
    ("RTX3080", 10, 0.36, None, _MARCH, False),
    ("RTX3080TI", 12, 0.41, None, _MARCH, False),
    ("RTX3090TI", 24, 0.51, None, _MARCH, False),
    ("RTX4070TI", 12, 0.39, None, _MARCH, False),
    ("RTX4080", 16, 0.59, None, _MARCH, False),
)

CATALOGUE = MappingProxyType({row[0]: Gpu(row[0], LONG_NAMES[row[0]], *row[1:]) for row in _ROWS})
