"""Waiting for what other processes and threads do.

How long a thing takes says more of the machine than of the thing: a limit is either `HANGS_S`, or
the claim itself, and then its control shows that without the mechanism it takes longer.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

Found = TypeVar("Found")

HANGS_S = 240.0  # what takes longer hangs, however busy the machine is
NEVER_S = 100 * HANGS_S  # a grace or a wait that would be noticed: beyond every limit of a test
LOOK_S = 0.02


def comes_true(condition: Callable[[], object], within_s: float) -> bool:
    """Whether a condition comes true in time: for bounds, and for controls that must not."""
    give_up_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(LOOK_S)
    return True


def wait_until(look: Callable[[], Found], what: str = "what is waited for") -> Found:
    """What a look has found, once that is true.

    Raises:
        AssertionError: It hangs.
    """
    give_up_at = time.monotonic() + HANGS_S
    while not (found := look()):
        assert time.monotonic() < give_up_at, f"{what} does not come within {HANGS_S:.0f} s"
        time.sleep(LOOK_S)
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or its parent has only to look."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_exists(path: Path) -> str:
    """A shell's line for a job that goes on as soon as the test makes this file."""
    return f"until test -e {shlex.quote(str(path))}; do sleep 0.05; done"


def remove_under_use(folder: Path) -> None:
    """Removes a folder in which others make and remove files at the same time."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
