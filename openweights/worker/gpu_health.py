"""Whether this machine's GPUs are fit for a job, asked of `nvidia-smi`.

A pod with a broken GPU would take job after job and fail each. Without `nvidia-smi`, or where it
does not answer, nothing is known and nothing is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from openweights.errors import ConfigurationError
from openweights.hardware import ask_nvidia_smi

logger = logging.getLogger(__name__)

HOTTEST_C = 90  # before a job, that is idle
LEAST_FREE = 0.85  # of the memory of each GPU
_FIELDS = ("index", "memory.total", "memory.used", "temperature.gpu")
_ECC = "ecc.errors.uncorrected.volatile.total"


def problem(env: Mapping[str, str]) -> str | None:
    """What is wrong with a GPU, in a few words, or None."""
    rows = query(env, [*_FIELDS, _ECC])
    return next((found for row in rows if (found := _problem_of(row)) is not None), None)


def used_too_much(env: Mapping[str, str]) -> str | None:
    """Which GPU has too little free memory, or None."""
    rows = query(env, ["index", "memory.total", "memory.used"])
    return next((found for row in rows if (found := _memory_problem(row)) is not None), None)


def query(env: Mapping[str, str], fields: list[str]) -> list[list[str]]:
    """A row of `fields` for each GPU; empty when `nvidia-smi` is absent or fails."""
    try:
        answer = ask_nvidia_smi(env, fields) or ""
    except ConfigurationError as error:
        logger.warning("%s; the GPUs are not checked", error)
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def _problem_of(row: list[str]) -> str | None:
    index, _, _, temperature, uncorrected = row
    # Cards without ECC, or without a sensor, answer "[N/A]".
    if _number(uncorrected) > 0:
        return f"GPU {index} has {uncorrected} uncorrected memory errors"
    if _number(temperature) > HOTTEST_C:
        return f"GPU {index} has {temperature} °C before it has begun"
    return _memory_problem(row[:3])


def _memory_problem(row: list[str]) -> str | None:
    index, total, used = row
    if _number(total) > 0 and _number(used) > (1 - LEAST_FREE) * _number(total):
        return f"GPU {index} has only {_number(total) - _number(used)} of {total} MiB free"
    return None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
