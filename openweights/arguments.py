"""Checks of what people pass to the client's methods: a sentence instead of a TypeError from
somewhere below.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from openweights.errors import InvalidInputError, closest, shown


def check_text(name: str, value: object, remedy: str) -> str:
    """The value, which is a string.

    Raises:
        InvalidInputError: It is none; says `remedy`.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{name}: {shown(value)} is no string; {remedy}")
    return value


def check_known(name: str, value: object, known: Sequence[str]) -> str:
    """The value, which is one of a few words.

    Raises:
        InvalidInputError: It is none of them; says which was probably meant.
    """
    if isinstance(value, str) and value in known:
        return value
    near = closest(value, known) if isinstance(value, str) else None
    meant = f"; did you mean {near!r}?" if near else ""
    raise InvalidInputError(f"{name}: {shown(value)} is none of {', '.join(known)}{meant}")


def check_whole(name: str, value: object, *, least: int = 0) -> int:
    """The value as an int, also where it is one of numpy's.

    Raises:
        InvalidInputError: It is no whole number, or less than `least`.
    """
    number = _index(value)
    if number is None or not least <= number < 1 << 63:
        raise InvalidInputError(f"{name}: {shown(value)} is no whole number from {least} on")
    return number


def check_limit(value: object) -> int | None:
    """How many to list at most; None for all.

    Raises:
        InvalidInputError: It is neither None nor a whole number.
    """
    number = None if value is None else _index(value)
    if value is not None and (number is None or not 0 <= number < 1 << 63):
        raise InvalidInputError(f"limit: {shown(value)} is no number of them; None is for all")
    return number


def check_seconds(name: str, value: object) -> float:
    """The value, a duration.

    Raises:
        InvalidInputError: It is no number of seconds, or a negative one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InvalidInputError(f"{name}: {shown(value)} is no number of seconds")
    return value


def as_path(name: str, value: object) -> Path:
    """The value as a path.

    Raises:
        InvalidInputError: It can be none.
    """
    is_path = isinstance(value, str | os.PathLike)
    text: object = os.fspath(cast("str", value)) if is_path else None
    if not isinstance(text, str) or not text or "\0" in text:
        wrong = shown(value)
        raise InvalidInputError(f"{name}: {wrong} is no path; give a string or a pathlib.Path")
    return Path(text)


def as_texts(name: str, value: object, remedy: str) -> list[str]:
    """Strings that may be given as a sequence, or as one.

    Raises:
        InvalidInputError: They are something else; says `remedy`.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence | set | frozenset):
        raise InvalidInputError(f"{name}: {shown(value)} is no list; {remedy}")
    return [check_text(name, item, remedy) for item in cast("Sequence[object]", value)]


def as_list(value: object) -> object:
    """A text alone as a list of it, and everything else as it is: for fields that take both."""
    return [value] if isinstance(value, str) else value


def _index(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(cast("int", value))
    except TypeError:
        return None
