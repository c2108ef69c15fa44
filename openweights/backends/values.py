"""Values as every store takes them: JSON, moments, text, and what a file is called."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from openweights.errors import InvalidInputError

_VALID_PURPOSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def to_json(value: Any, what: str) -> str:
    """JSON text of `value`; numbers that JSON lacks (NaN, infinities) become null.

    Raises:
        InvalidInputError: `what` holds something that is no JSON.
    """
    try:
        return dump(value)
    except ValueError:
        pass
    except TypeError as error:
        raise _not_json(what, error) from None
    try:
        return dump(_finite(value))
    except (TypeError, RecursionError) as error:
        raise _not_json(what, error) from None


def dump(value: Any) -> str:
    """Compact JSON text.

    Raises:
        TypeError, ValueError: It is no JSON.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def contains(value: Any, part: Any) -> bool:
    """Whether JSON `value` contains `part`: mappings by their keys, all else by equality."""
    if isinstance(part, dict) and isinstance(value, dict):
        whole = cast(dict[str, Any], value)
        items = cast(dict[str, Any], part).items()
        return all(key in whole and contains(whole[key], item) for key, item in items)
    return _equal(value, part)


def storable(text: str) -> str:
    """Text as UTF-8 can hold it; output of a broken program may hold half characters."""
    return text.encode("utf-8", "replace").decode()


def check_moment(moment: datetime) -> datetime:
    """The moment, if it has a time zone.

    Raises:
        InvalidInputError: It has none.
    """
    if moment.tzinfo is None:
        raise InvalidInputError(
            f"{moment.isoformat()} has no time zone: use datetime.now(timezone.utc) or add tzinfo"
        )
    return moment


def check_purpose(purpose: str) -> None:
    """Raise InvalidInputError for a purpose that cannot be part of a file id."""
    if not _VALID_PURPOSE.fullmatch(purpose):
        raise InvalidInputError(
            f"purpose {purpose!r} cannot be part of a file id: use letters, digits, _ and -"
        )


def base_name(filename: str) -> str:
    """Last part of a path of any operating system, as text that can be stored."""
    name = re.split(r"[\\/]", filename.rstrip("\\/"))[-1]
    return storable(name) or "file"


def _not_json(what: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"{what} must be JSON: {error}; convert it first, for example with float() or str()"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast(Sequence[Any], value)]
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        whole, other = cast(dict[str, Any], a), cast(dict[str, Any], b)
        return whole.keys() == other.keys() and all(_equal(whole[k], other[k]) for k in whole)
    if isinstance(a, list) and isinstance(b, list):
        items, others = cast(list[Any], a), cast(list[Any], b)
        return len(items) == len(others) and all(map(_equal, items, others))
    # Python takes True for 1, JSON does not.
    return a == b and isinstance(a, bool) == isinstance(b, bool)
