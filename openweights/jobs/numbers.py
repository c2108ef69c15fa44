"""Numbers that jobs take as parameters: what is finite is not yet usable. A count of 10**12 would
be waited for without end, and 1e-300 is 0, and 1e300 infinite, to 32 bits. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from openweights.errors import ConfigError

MOST = 1_000_000_000  # of whatever is counted; steps that never come are set so
MOST_TOKENS = 10_000_000  # of a row
MOST_ROWS = 100_000  # of a batch
LEAST = 1e-12  # of a number that may be 0
MOST_GB = 100_000


def _whole(value: object) -> object:
    """`8.0` is 8: division and JSON make such numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tellable(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"is {value:g}, hardly to be told from 0; give 0, or at least {LEAST:g}")
    return value


def _zero_or_temperature(value: float) -> float:
    if 0 < value < _COLDEST:
        raise ValueError(f"is {value:g}, too near to 0; give 0 (greedy), or at least {_COLDEST:g}")
    return value


_COLDEST, _HOTTEST = 1e-3, 1e3

Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=MOST)]
Tokens = Annotated[Whole, Field(ge=1, le=MOST_TOKENS)]
Rows = Annotated[Whole, Field(ge=1, le=MOST_ROWS)]
# From 0 on, as far as 32 bits tell it.
Amount = Annotated[float, Field(ge=0), AfterValidator(_tellable)]
Temperature = Annotated[float, Field(ge=_COLDEST, le=_HOTTEST)]
TemperatureOrGreedy = Annotated[
    float, Field(ge=0, le=_HOTTEST, allow_inf_nan=False), AfterValidator(_zero_or_temperature)
]
TopP = Annotated[float, Field(ge=1e-6, le=1)]


def check_memory(gb: int | None, sizes: Mapping[str, tuple[float, float]]) -> int | None:
    """`gb`, if machines may have so much.

    Args:
        sizes: Of the fields that it comes from: value and default.

    Raises:
        ConfigError: They do not; names the field that is furthest above its default.
    """
    if gb is None or gb <= MOST_GB:
        return gb
    field = max(sizes, key=lambda name: sizes[name][0] / sizes[name][1])
    raise ConfigError(f"{field}: {sizes[field][0]} would take {gb:,} GiB of GPU memory; lower it")
