"""Signs of life of long work that logs nothing: what gets further calls `advanced`, and who would
take its silence for a hang, or counts what is done, hears of it.

No sign is given by a clock alone, which would go on ticking in a job that hangs: each stands for
tokens, rows or bytes that were not there before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

# A process that loads or downloads a model moves more than this in such a time; what its other
# threads read and write meanwhile, such as these signs, is less.
LOOK_EVERY_S = 10.0
LEAST_BYTES = 1 << 18

_IO = Path("/proc/self/io")
_MOVED = ("rchar", "wchar", "read_bytes")  # by calls, and by reading memory that is a file
_listeners: list[Callable[[], None]] = []
_counters: list[Callable[[int], None]] = []


@contextmanager
def heard_by(listener: Callable[[], None]) -> Generator[None]:
    """Meanwhile `listener` is called, often and from any thread, as this process gets further."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def counted_by(counter: Callable[[int], None]) -> Generator[None]:
    """Meanwhile `counter` is told how many answers or rows are done that were asked for."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.remove(counter)


def advanced(done: int = 0) -> None:
    """Something is done that was not before: tokens, a batch, a row.

    Args:
        done: How many of what was asked for, answers or rows, are done with it.
    """
    for listener in _listeners:
        listener()
    for counter in _counters if done else ():
        counter(done)


@contextmanager
def transferring() -> Generator[None]:
    """Meanwhile the bytes that this process reads and writes count, whoever moves them."""
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended,), name="progress", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(ended: threading.Event) -> None:
    before = _bytes_moved()
    while not ended.wait(LOOK_EVERY_S):
        now = _bytes_moved()
        if now - before >= LEAST_BYTES:
            advanced()
        before = now


def _bytes_moved() -> int:
    """By this process since it started; 0 where that cannot be known."""
    try:
        lines = _IO.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = dict(line.split(": ") for line in lines)
    return sum(int(values[name]) for name in _MOVED)
