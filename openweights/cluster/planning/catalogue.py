"""The GPUs that can be rented, what they cost, and how hardware strings are read.

Prices are only where the cluster starts from: the provider's own answers replace them
(`Market.restocked`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import cache
from types import MappingProxyType

from openweights.client.job_options import normalize_hardware
from openweights.cluster.planning.observation import PodCloud
from openweights.errors import InvalidInputError
from openweights.gpu_names import LONG_NAMES, gpu_key

CLOUDS: tuple[PodCloud, ...] = ("SECURE", "COMMUNITY")
GPU_COUNTS = (1, 2, 4, 8)
"""Sizes of pods that are chosen without being named; a host has eight GPUs at most."""
MARGIN_GB = 5
"""Of each GPU's memory, what the driver and the rounding of its size may keep from a job."""


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


def parse_hardware(text: str) -> tuple[int, str]:
    """Count and key of a hardware string: "2x A100 SXM 80GB" -> (2, "A100S").

    Raises:
        InvalidInputError: It is no hardware string, or names a GPU that is not in the catalogue.
    """
    found = known_hardware(text)
    if found is not None:
        return found
    (normal,) = normalize_hardware(text) or ("",)  # says what is wrong with one that has no form
    raise InvalidInputError(
        f"{normal!r} is not known here; choose among {', '.join(sorted(CATALOGUE))}"
    )


def canonical_hardware(text: str) -> str:
    """The one way to write it, for comparing; hardware that is not known only in upper case."""
    found = known_hardware(text)
    return f"{found[0]}x {found[1]}" if found else text.upper()


@cache
def known_hardware(text: str) -> tuple[int, str] | None:
    """As `parse_hardware`, with None for what it refuses."""
    try:
        (normal,) = normalize_hardware(text) or ("",)
    except InvalidInputError:
        return None
    count, _, name = normal.partition("x ")
    key = gpu_key(name)
    return None if key is None else (int(count), key)


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
