"""Says what a job does while it makes no step, and how far that has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from openweights import progress
from openweights.events import Stage

# A stage is told of again when so much of its time has passed since the last word, within bounds.
SHARE = 0.1
SHORTEST_S, LONGEST_S = 2.0, 10.0


class CountedStage:
    """A stage that is told of at once, and again as its parts are done.

    Args:
        log: Receives the events.
        doing, step: As of `Stage`.
        of: How many parts it has; 0 where nobody knows yet, and none are told of.
        unit: What a part is, in the plural.
    """

    def __init__(
        self,
        log: Callable[[dict[str, Any]], object],
        doing: str,
        *,
        of: int = 0,
        unit: str = "",
        step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.of = of
        self._log, self._doing, self._unit, self._step = log, doing, unit, step
        self._clock = clock
        self._done = 0
        self._began_at = clock()
        self._tell()

    def add(self, count: int) -> None:
        """So many more parts are done."""
        self._done += count
        now = self._clock()
        wait_s = min(max(SHARE * (now - self._began_at), SHORTEST_S), LONGEST_S)
        if now - self._told_at >= wait_s:
            self._tell()

    def _tell(self) -> None:
        self._told_at = self._clock()
        part = f"{self._done}/{self.of} {self._unit}" if self.of else None
        self._log(Stage(doing=self._doing, step=self._step, part=part).data())


@contextmanager
def counted_stage(
    log: Callable[[dict[str, Any]], object],
    doing: str,
    *,
    of: int = 0,
    unit: str = "",
    step: int | None = None,
) -> Generator[None]:
    """As `CountedStage`, of what is done meanwhile (`progress.advanced`)."""
    with progress.counted_by(CountedStage(log, doing, of=of, unit=unit, step=step).add):
        yield
