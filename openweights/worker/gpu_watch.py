"""Whether the job of a pod uses the GPUs that are paid for: one that does not is told of, and then
ended, with its pod.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from openweights.worker.gpu_health import query

LOOK_EVERY_S = 30.0
LEAST_PERCENT = 5
WARN_SHARE = 0.75  # of the time that a GPU may idle, after which that is said

State = Literal["busy", "warned", "ended"]


@dataclass(frozen=True, slots=True)
class Idleness:
    """How long the GPUs have done next to nothing.

    Attributes:
        busy_at: When they were last seen to work; at first when the job began.
    """

    busy_at: float
    state: State = "busy"

    def seen(self, percent: int | None, now: float, limit_s: float) -> Idleness:
        """With one more look at them.

        Args:
            percent: Of the time that the busiest GPU has worked; None where nobody can tell, which
                counts as work.
        """
        if percent is None or percent >= LEAST_PERCENT:
            return Idleness(now)
        idle_s = now - self.busy_at
        if idle_s >= limit_s:
            return Idleness(self.busy_at, "ended")
        warned = self.state == "warned" or idle_s >= WARN_SHARE * limit_s
        return Idleness(self.busy_at, "warned" if warned else "busy")


def utilization(env: Mapping[str, str]) -> int | None:
    """Percent of the last moments in which the busiest GPU has worked; None where nobody tells."""
    rows = query(env, ["utilization.gpu"])
    told = [int(row[0]) for row in rows if row[0].isdecimal()]
    return max(told, default=None)


@contextlib.contextmanager
def watching(
    env: Mapping[str, str],
    limit_s: float,
    on_warning: Callable[[float], None],
    on_end: Callable[[], None],
) -> Iterator[None]:
    """Meanwhile look at the GPUs, from a thread of its own.

    Args:
        limit_s: They may idle for so long.
        on_warning: Called once they have for most of it, with the seconds that are left.
        on_end: Called once they have for all of it; nothing is looked at afterwards.
    """
    is_over = threading.Event()

    def look() -> None:
        idleness = Idleness(time.monotonic())
        while not is_over.wait(min(LOOK_EVERY_S, limit_s / 20)):
            before, now = idleness, time.monotonic()
            idleness = before.seen(utilization(env), now, limit_s)
            if idleness.state == "ended":
                on_end()
                return
            if idleness.state == "warned" and before.state == "busy":
                on_warning(limit_s - (now - idleness.busy_at))

    thread = threading.Thread(target=look, name="GPU watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
