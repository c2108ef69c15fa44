"""How hardware strings are read; what can be rented stands in `gpu_catalogue.py`."""

from __future__ import annotations

from functools import cache

from openweights.client.job_options import normalize_hardware
from openweights.errors import InvalidInputError
from openweights.gpu_catalogue import CATALOGUE
from openweights.gpu_names import gpu_key


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
