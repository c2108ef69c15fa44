"""Moments, purposes and file names, as every store takes them."""

from __future__ import annotations

import re
from datetime import datetime

from openweights.errors import InvalidInputError
from openweights.json_values import storable

_VALID_PURPOSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


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
