"""Trying again what fails for the moment: the one loop for it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0

_last_moment: ContextVar[float | None] = ContextVar("last_moment", default=None)


@contextmanager
def no_later_than(moment: float | None) -> Generator[None]:
    """Whatever is retried inside, however deep, is not after `moment` (of `time.monotonic`)."""
    token = _last_moment.set(moment)
    try:
        yield
    finally:
        _last_moment.reset(token)


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """How long to wait after so many failures in a row: `first_s` after none, then the double each
    time, up to `longest_s`.
    """
    return min(first_s * 2.0 ** min(failures, 1000), longest_s)


def delays(longest_s: float = LONGEST_DELAY_S) -> Iterator[float]:
    """Seconds to wait before each further try: doubling, bounded, and spread, so that many who
    wait for the same thing do not come back in step.
    """
    for number in itertools.count():
        yield backoff_s(number, FIRST_DELAY_S, longest_s) * random.uniform(0.5, 1.0)


def retry(
    call: Callable[[], T],
    errors: type[Exception] | tuple[type[Exception], ...],
    *,
    patience_s: float | None = None,
    pause: Callable[[float], object] = time.sleep,
    longest_s: float = LONGEST_DELAY_S,
    on_error: Callable[[Exception, float], None] | None = None,
) -> T:
    """The answer of `call`, tried again for as long as it raises one of `errors`.

    An error's own `retry_after_s`, where it has one, is the least pause before the next try.

    Args:
        patience_s: Counted from the first failure; None for no end.
        pause: Waits so many seconds; returns something true to give up, such as an Event's `wait`.
        on_error: Told of each error, and of how long the pause will be.

    Raises:
        Exception: The last of `errors`, when patience or the time of `no_later_than` was over, or
            `pause` gave up.
    """
    give_up_at: float | None = None
    for delay_s in delays(longest_s):
        try:
            return call()
        except errors as error:
            now = time.monotonic()
            if give_up_at is None and patience_s is not None:
                give_up_at = now + patience_s
            wait_s = max(delay_s, getattr(error, "retry_after_s", 0.0))
            if give_up_at is not None and now + wait_s > give_up_at:
                raise
            if (last := _last_moment.get()) is not None:
                if now >= last:
                    raise
                wait_s = min(wait_s, last - now)
            if on_error is not None:
                on_error(error, wait_s)
            if pause(wait_s):
                raise
    raise AssertionError("delays() never ends")
