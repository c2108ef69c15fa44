"""Event data as JSON: what a trainer logs, made storable, or refused with the name of the key.

Scalars of numpy and torch become Python numbers. NaN and infinities are no JSON; they become the
strings "NaN", "Infinity" and "-Infinity", which `as_number` reads back, so that a diverged loss is
not lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Set
from datetime import datetime
from pathlib import PurePath
from typing import Any, cast

from openweights.errors import InvalidInputError
from openweights.json_values import cleaned, kind_of

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def event_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` that is JSON.

    Raises:
        InvalidInputError: It is not a mapping, or a value cannot be stored; the message names its
            key.
    """
    given = cast("object", data)
    if not isinstance(given, Mapping):
        raise InvalidInputError(
            f"run.log takes a dict like {{'step': 1, 'loss': 0.5}}, not {type(given).__name__}"
        )
    try:
        return cleaned(cast("object", given), "", number=_spelled, other=_scalar)
    except InvalidInputError as error:
        raise InvalidInputError(f"run.log: {error}") from None


def json_text(row: Mapping[str, Any], *, ensure_ascii: bool = True) -> str:
    """A row of a file as JSON; one that holds what is none is made storable as `event_data` does.

    Raises:
        InvalidInputError: A value cannot be stored.
    """
    try:
        return json.dumps(row, ensure_ascii=ensure_ascii, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(event_data(row), ensure_ascii=ensure_ascii)


def as_number(value: object) -> float | int | None:
    """`value` as a number if it is one, also a NaN or infinity as `event_data` stores it; bools are
    none.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    return _NUMBERS.get(value) if isinstance(value, str) else None


def _scalar(value: Any, at: str) -> object:
    """Of a set its members; of a path, a moment, or a numpy or torch scalar (whatever has `.item()`
    and holds one value), its value.
    """
    if isinstance(value, Set):
        return list(cast("Set[object]", value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    item = cast("Callable[[], object] | None", getattr(value, "item", None))
    if not callable(item):
        raise InvalidInputError(
            f"{at!r} is a {kind_of(value)}, which is not JSON; log numbers, strings, lists or dicts"
        )
    try:
        plain = item()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{at!r} is a {kind_of(value)} of more than one value; log value.tolist() or its mean"
        ) from error
    if type(plain) is type(value):
        raise InvalidInputError(f"{at!r} is a {kind_of(value)}, which is not JSON")
    return plain


def _spelled(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
