"""Event data as JSON: what a trainer logs, made storable, or refused with the name of the key.

Scalars of numpy and torch become Python numbers. NaN and infinities are no JSON; they become the
strings "NaN", "Infinity" and "-Infinity", which `as_number` reads back, so that a diverged loss is
not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import PurePath
from typing import Any, cast

from openweights.errors import InvalidInputError

_DEEPEST = 100
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
    return _mapping(cast("Mapping[object, object]", given), "", 0)


def as_number(value: object) -> float | int | None:
    """`value` as a number if it is one, also a NaN or infinity as `event_data` stores it; bools are
    none.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    return _NUMBERS.get(value) if isinstance(value, str) else None


def _mapping(data: Mapping[object, object], at: str, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = _text(key.value) if isinstance(key, Enum) else _text(str(key))
        result[name] = _value(value, f"{at}.{name}" if at else name, depth + 1)
    return result


def _value(value: object, at: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise InvalidInputError(f"run.log: {at[:80]}… is nested too deeply, or holds itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _value(value.value, at, depth + 1)
    if isinstance(value, str | PurePath | datetime):
        return _text(value.isoformat() if isinstance(value, datetime) else str(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _float(float(value))
    if isinstance(value, Mapping):
        return _mapping(cast("Mapping[object, object]", value), at, depth)
    if isinstance(value, list | tuple | set | frozenset):
        items = cast("list[object]", value)
        return [_value(item, f"{at}[{index}]", depth + 1) for index, item in enumerate(items)]
    return _scalar(value, at, depth)


def _scalar(value: object, at: str, depth: int) -> Any:
    """A numpy or torch scalar: whatever has `.item()` and holds one value."""
    item = cast("Callable[[], object] | None", getattr(value, "item", None))
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if not callable(item):
        raise InvalidInputError(
            f"run.log: {at!r} is a {kind}, which is not JSON; log numbers, strings, lists or dicts"
        )
    try:
        plain = item()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"run.log: {at!r} is a {kind} of more than one value; log value.tolist() or its mean"
        ) from error
    if type(plain) is type(value):
        raise InvalidInputError(f"run.log: {at!r} is a {kind}, which is not JSON")
    return _value(plain, at, depth + 1)


def _float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _text(value: str) -> str:
    """Without what no store can hold: half surrogates and NUL."""
    if "\0" not in value and value.isascii():
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
