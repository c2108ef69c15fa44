"""What a run came to, by how its process ended and what it was told to do; pure functions."""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass
from typing import Literal

from openweights.errors import OpenWeightsError, in_a_line
from openweights.types import Instruction
from openweights.worker.causes import Cause
from openweights.worker.process import ProcessEnd

# What a line of a job's log begins with: when, and how bad.
_WHEN = r"\d{4}-\d\d-\d\d[ T][\d:,.]+ "
_LOG_PREFIX = re.compile(_WHEN + "(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):? ")
_HARMLESS = re.compile(_WHEN + "(?:DEBUG|INFO|WARNING):? ")
_SERIOUS = re.compile(_WHEN + "(?:ERROR|CRITICAL):? ")
LONGEST_REASON = 400
HUNG = "stopped: it hung"
# Exit codes of a job that SIGTERM or SIGINT ended, as the guard and as a shell say it.
TERMINATED = frozenset({-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run came to: a status, or `released` (back to the queue), or `lost` (the same, but it
    hung), or `fenced` (not ours any more).
    """

    outcome: Literal["completed", "failed", "canceled", "released", "lost", "fenced"]
    reason: str | None = None
    exit_code: int | None = None
    cause: Cause | None = None


def judge(instruction: Instruction, end: ProcessEnd, last_line: str) -> Verdict:
    """What a run came to. A job that ended before a stop reached it counts by its exit code."""
    if instruction == "fenced":
        return Verdict("fenced")
    if end.was_stopped and instruction == "cancel":
        return Verdict("canceled", "on request")
    if end.was_stopped and instruction == "timeout":
        return Verdict("failed", "stopped: its timeout has passed")
    if end.was_stopped and instruction == "stalled":
        return Verdict("lost", HUNG)
    if instruction == "shutdown" and (end.was_stopped or end.exit_code in TERMINATED):
        return Verdict("released", "its worker was shut down, not counted")
    if instruction == "continue" and end.was_stopped:
        return Verdict("released", "its worker stood still for longer than its lease, not counted")
    if end.exit_code is None:
        return Verdict("lost", "the process that guards the job was killed, and the job with it")
    if end.exit_code == 0:
        return Verdict("completed", exit_code=0)
    return Verdict("failed", describe_exit(end.exit_code, last_line), end.exit_code)


def describe_exit(exit_code: int, last_line: str) -> str:
    """One line for a job that failed by itself: `exit code 1: ValueError: no rows`."""
    # A shell says 128 + n when its command was killed by signal n.
    signum = -exit_code if exit_code < 0 else exit_code - 128
    name = ""
    if signum > 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(signum).name
    if signum == signal.SIGKILL:
        name += ", often for lack of memory"
    text = f"killed by signal {signum}" if exit_code < 0 else f"exit code {exit_code}"
    text += f" ({name})" if name else ""
    said = words_of(last_line)
    return shorten(f"{text}: {said}" if said else text)


def last_said(output: str) -> str:
    """The line that says why a job ended: the last one. What a process tells on its way out, behind
    the error that ends it, is no reason.

    Args:
        output: The last lines of the job's log.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", output.rstrip())]
    at = len(lines) - 1
    while at > 0 and _HARMLESS.match(lines[at]):
        at -= 1
    return lines[at] if _SERIOUS.match(lines[at]) else lines[-1]


def words_of(line: str) -> str:
    """A line of a log without its time and level."""
    return _LOG_PREFIX.sub("", line)


def one_line(error: Exception) -> str:
    """The reason for a failure in the worker's hands."""
    text = " ".join(str(error).split())
    return shorten(text if text and isinstance(error, OpenWeightsError) else in_a_line(error))


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
