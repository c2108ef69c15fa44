"""Retrying decorators under the path that scripts of the older runner import.

The client retries by itself (`openweights/retry.py`), so `supabase_retry` only spares such scripts
a change. Waits double up to `max_delay`, or are `interval` apart.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httpx

from openweights.errors import PlatformError

F = TypeVar("F", bound=Callable[..., Any])

_RAISE = object()
_PASSING_STATUS = (408, 409, 429)


def supabase_retry(
    max_time: float = 60,
    max_tries: int = 8,
    base: float = 1,
    factor: float = 2,
    max_delay: float = 60,
    return_on_exhaustion: Any = _RAISE,
) -> Callable[[F], F]:
    """Call again after errors of the network or the store that may pass.

    Args:
        max_time: Seconds from the first call to the last.
        base, factor, max_delay: First wait, by what it grows, and the longest, in seconds.
        return_on_exhaustion: Returned in place of the last error.
    """
    waits = [min(base * factor**n, max_delay) for n in range(max_tries - 1)]
    return _again(waits, max_time, (PlatformError,), return_on_exhaustion)


def openai_retry(
    factor: float = 1.5,
    max_value: float = 60,
    interval: float | None = None,
    max_time: float | None = None,
    max_tries: int = 10,
    extra_exceptions: tuple[type[Exception], ...] = (),
) -> Callable[[F], F]:
    """Call again after errors of an API that may pass: no connection, too many requests, its own.

    Args:
        factor, max_value: By what waits grow from one second, and the longest, in seconds.
        interval: Between calls; instead of growing waits.
        extra_exceptions: Count as passing, too.
    """
    growing = [min(factor**n, max_value) for n in range(max_tries - 1)]
    waits = growing if interval is None else [interval] * (max_tries - 1)
    return _again(waits, max_time, (PlatformError, *extra_exceptions), _RAISE)


def _again(
    waits: list[float], max_time: float | None, errors: tuple[type[Exception], ...], last: Any
) -> Callable[[F], F]:
    tries = _Tries(waits, max_time, (httpx.TransportError, *errors), last)

    def decorate(call: F) -> F:
        return cast("F", (_later if inspect.iscoroutinefunction(call) else _sync)(call, tries))

    return decorate


@dataclass(frozen=True, slots=True)
class _Tries:
    waits: list[float]
    max_time: float | None
    errors: tuple[type[Exception], ...]
    last: Any

    def attempts(self) -> Iterator[float | None]:
        """Of each call the seconds to wait after it, None after the last."""
        end = math.inf if self.max_time is None else time.monotonic() + self.max_time
        for wait in self.waits:
            if time.monotonic() + wait >= end:
                break
            yield wait
        yield None

    def go_on(self, error: Exception, wait: float | None) -> bool:
        """Whether there is another call, or an answer in place of the error."""
        passes = isinstance(error, self.errors) or _is_passing(error)
        return passes and (wait is not None or self.last is not _RAISE)


def _sync(call: Callable[..., Any], tries: _Tries) -> Callable[..., Any]:
    @functools.wraps(call)
    def again(*args: Any, **kwargs: Any) -> Any:
        for wait in tries.attempts():
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if not tries.go_on(error, wait):
                    raise
            time.sleep(wait or 0)
        return tries.last

    return again


def _later(call: Callable[..., Any], tries: _Tries) -> Callable[..., Any]:
    @functools.wraps(call)
    async def again(*args: Any, **kwargs: Any) -> Any:
        for wait in tries.attempts():
            try:
                return await call(*args, **kwargs)
            except Exception as error:
                if not tries.go_on(error, wait):
                    raise
            await asyncio.sleep(wait or 0)
        return tries.last

    return again


def _is_passing(error: Exception) -> bool:
    """Whether an error of an HTTP client says that it may pass."""
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(status, int):
        return status in _PASSING_STATUS or status >= 500  # noqa: PLR2004 - HTTP
    return bool(names & {"APIConnectionError", "APITimeoutError"})
