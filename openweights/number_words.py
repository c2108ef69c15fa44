"""How numbers are written for people, in figures, tables, cards and messages alike, and as the
page writes them: `5e-5`, and neither `5e-05` nor `0.00005`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import cast

_SMALL = 1e-3  # below it rates are written by their power of ten


def number_words(value: float, digits: int | None = None) -> str:
    """The number, with all its digits, as Python reads it, or so many of them at most."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    text = repr(value) if digits is None else f"{value:.{digits}g}"
    if 0 < abs(value) < _SMALL or "e" in text:
        return f"{Decimal(text).normalize():e}"
    return text


def value_words(value: object) -> str:
    """A parameter's value: texts as they are, the numbers in it as all numbers are written."""
    return value if isinstance(value, str) else _within(value)


def _within(value: object) -> str:
    if isinstance(value, float):
        return number_words(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return "{" + ", ".join(f"{_within(key)}: {_within(one)}" for key, one in items) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "[" + ", ".join(map(_within, cast("Sequence[object]", value))) + "]"
    return repr(value)
