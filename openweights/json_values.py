"""JSON as every store, log and reader of ours can hold it: the one place that makes it so, and that
reads what people wrote without changing it.

What JSON lacks is replaced or refused: numbers that are not finite, NUL and half characters, which
PostgreSQL and UTF-8 cannot hold, and objects of other kinds. `cleaned` walks a value; what differs
between its users (what becomes of NaN, which objects they know) they pass in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, cast

from openweights.errors import InvalidInputError

DEEPEST = 100
LONGEST_PLACE = 200  # in characters
_MOST_BITS = 13_000  # of an integer that Python writes and reads


def storable(text: str) -> str:
    """Text as UTF-8 and PostgreSQL can hold it: without NUL and half characters."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def cleaned(
    value: object,
    at: str,
    *,
    number: Callable[[float], Any] = lambda _: None,
    text: Callable[[str], str] = storable,
    other: Callable[[Any, str], object] | None = None,
    depth: int = 0,
) -> Any:
    """A copy of `value` that is JSON.

    Args:
        at: What it is called in errors; places inside are named below it, as `at.key[2]`.
        number: What becomes of NaN and infinities; None by default.
        text: What becomes of texts, and of keys; by default what every store can hold of them.
        other: A value in place of one that is no JSON, given with where it is; may raise. Without
            it such values are refused.

    Raises:
        InvalidInputError: It cannot be JSON; the message says where.
    """
    if depth > DEEPEST:
        raise InvalidInputError(f"{at[:80]}… is nested too deeply, or holds itself")
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float | str):
        return _atom(value, number, text)

    def inner(item: object, place: str) -> Any:
        return cleaned(item, place, number=number, text=text, other=other, depth=depth + 1)

    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        named = [(text(_name(key)), item) for key, item in pairs]
        return {name: inner(item, f"{at}.{name}" if at else name) for name, item in named}
    if isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        return [inner(item, f"{at}[{index}]") for index, item in enumerate(items)]
    if other is None:
        raise InvalidInputError(
            f"{at} must be JSON, and {kind_of(value)} is none; convert it first, for example with "
            "float() or str()"
        )
    return inner(other(value, at), at)


def _atom(
    value: bool | float | str | None, number: Callable[[float], Any], text: Callable[[str], str]
) -> Any:
    """As Python's own type: numpy's float64 is a float, and prints as something else."""
    if isinstance(value, str):
        return text(str(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else number(float(value))
    return value if value is None or isinstance(value, bool) else int(value)


def _name(key: object) -> str:
    return str(key.value if isinstance(key, Enum) else key)


def kind_of(value: object) -> str:
    """The type of a value, in words for an error: `numpy.ndarray`, `list`."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def to_json(value: object, what: str) -> str:
    """JSON text of `value`, cleaned where that is needed.

    Raises:
        InvalidInputError: `what` holds something that is no JSON.
    """
    try:
        text = dump(value)
    except (TypeError, ValueError, RecursionError):
        return dump(cleaned(value, what))
    # Nearly everything is clean, and telling so from the text is faster than walking the value.
    if "\\u0000" in text or "\\ud" in text or text.count("[") + text.count("{") > DEEPEST:
        return dump(cleaned(value, what))
    return text


def as_written(value: object, what: str) -> str:
    """JSON text with all that a value holds, also what JSON lacks: for a check that names it.

    Raises:
        InvalidInputError: `what` holds something that cannot be written at all.
    """
    try:
        return json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        plain = cleaned(value, what, number=float, text=str)
    return json.dumps(plain, separators=(",", ":"))


def dump(value: object) -> str:
    """Compact JSON text.

    Raises:
        TypeError, ValueError: It is no JSON.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def contains(value: Any, part: Any) -> bool:
    """Whether JSON `value` contains `part`: mappings by their keys, all else by equality."""
    if isinstance(part, dict) and isinstance(value, dict):
        whole = cast("dict[str, object]", value)
        items = cast("dict[str, object]", part).items()
        return all(key in whole and contains(whole[key], item) for key, item in items)
    return _equal(value, part)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        whole, other = cast("dict[str, object]", a), cast("dict[str, object]", b)
        return whole.keys() == other.keys() and all(_equal(whole[k], other[k]) for k in whole)
    if isinstance(a, list) and isinstance(b, list):
        items, others = cast("list[object]", a), cast("list[object]", b)
        return len(items) == len(others) and all(
            _equal(*pair) for pair in zip(items, others, strict=True)
        )
    # Python takes True for 1, JSON does not.
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


# ---- reading what people wrote -------------------------------------------------------------------


class UnfitJSONError(ValueError):
    """Text is JSON for Python, and would still not be read as it is written; says what to do.

    Attributes:
        field: Where, as far as it is known; may be empty.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class Rewritten(float):
    """A number that would be written in another way than it was: 1e2 as 100.0, 1.10 as 1.1.

    Attributes:
        written: As it was.
    """

    written: str

    def __new__(cls, digits: str) -> Rewritten:
        number = super().__new__(cls, digits)
        number.written = digits
        return number


_NAN, _TOO_LARGE = object(), object()
_STRANGE = {
    _NAN: "is NaN or Infinity, which is not JSON; use a number or leave it out",
    _TOO_LARGE: "is larger than a float can hold; make it a finite number",
}


def read_json(text: str) -> Any:
    """The value of a JSON text. Numbers that would be written in another way are `Rewritten`.

    Raises:
        json.JSONDecodeError: It is none.
        UnfitJSONError: A key appears twice in one object; a number is none that JSON has, or that a
            float holds; it is nested too deeply.
    """
    try:
        return _USUAL.decode(text)
    except (ValueError, RecursionError):
        return _read_unusual(text)


def _read_unusual(text: str) -> Any:
    """`read_json` of a text that has something wrong, which is found and said."""
    strange = False

    def constant(_: str) -> object:
        nonlocal strange
        strange = True
        return _NAN

    def real(digits: str) -> object:
        nonlocal strange
        if math.isfinite(float(digits)):
            return _real(digits)
        strange = True
        return _TOO_LARGE

    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=constant,
            parse_float=real,
            parse_int=_whole,
        )
    except (json.JSONDecodeError, UnfitJSONError):
        raise
    except RecursionError:
        raise UnfitJSONError("", "is nested too deeply; flatten it") from None
    except ValueError as error:
        raise UnfitJSONError("", f"is not JSON ({error}); shorten the number") from None
    if strange:
        place, number = _strange_number(value)
        raise UnfitJSONError(place, _STRANGE[number])
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnfitJSONError(twice, "appears twice in one object; keep one of them")
    return result


def _constant(name: str) -> float:
    raise ValueError(name)


def _real(digits: str) -> float:
    """A number with a fraction or an exponent.

    Raises:
        ValueError: It is larger than a float can hold.
    """
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(digits)
    return value if repr(value) == digits else Rewritten(digits)


def _whole(digits: str) -> float:
    return Rewritten(digits) if digits == "-0" else int(digits)


# Made once: with hooks of each call's own, making it takes longer than reading a short row.
_USUAL = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_float=_real, parse_int=_whole
)


def _strange_number(value: Any) -> tuple[str, object]:
    """Where the first of `_STRANGE` is, if that can be said shortly, and which it is."""
    place, found = next(
        (at, part) for at, part in parts_of(value) if part is _NAN or part is _TOO_LARGE
    )
    return ("" if len(place) > LONGEST_PLACE else place), found


def rewritten_number(value: object, at: str = "") -> tuple[str, Rewritten] | None:
    """The first number in a value that would be written in another way, and where it is."""
    found = ((place, part) for place, part in parts_of(value, at) if isinstance(part, Rewritten))
    return next(found, None)


def texts_of(value: object, at: str = "") -> Iterator[tuple[str, str]]:
    """The texts in a value, each with where it is, as `key[2]`; an object's keys are texts, too."""
    for place, part in parts_of(value, at):
        if isinstance(part, str):
            yield place, part
        elif isinstance(part, Mapping):
            yield from ((place, key) for key in cast("Mapping[str, object]", part))


def check_exact(value: object, at: str) -> None:
    """See that every store gives a value back as it is.

    Args:
        at: What it is called in errors.

    Raises:
        InvalidInputError: It holds a number or a text that JSON, UTF-8 or PostgreSQL lacks.
    """
    for place, part in parts_of(value, at):
        items: list[object] = [part]
        if isinstance(part, Mapping):
            items += cast("Mapping[object, object]", part)
        for item in items:
            if problem := _inexact(item):
                name = place if len(place) <= LONGEST_PLACE else at
                raise InvalidInputError(f"{storable(name)}: {problem}")


def _inexact(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {float(value)}, which JSON lacks; leave it out"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "is a number of more than 4,000 digits; give a smaller one"
    if isinstance(value, str) and storable(value) != value:
        return "holds NUL or half a surrogate pair, which UTF-8 or PostgreSQL lacks; remove it"
    return None


def is_deep(value: object) -> bool:
    """Whether a value is nested more than `DEEPEST` times."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for part in level for _, item in _items(part, "")]
    return bool(level)


def parts_of(value: object, at: str = "") -> Iterator[tuple[str, object]]:
    """A value and all that is in it, each with where it is, in their order."""
    waiting = [(at, value)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        waiting += reversed([*_items(part, place)])


def _items(value: object, at: str) -> Iterator[tuple[str, object]]:
    """What an object or a list holds, and where that is."""
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[str, object]", value).items():
            yield (f"{at}.{key}" if at else key), item
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(cast("Iterable[object]", value)):
            yield f"{at}[{index}]", item
