"""Every number that a job has logged, as series over its steps, thinned for a chart's pixels."""

from __future__ import annotations

import math
import threading
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from openweights.backends.base import Backend
from openweights.client.event_json import as_number
from openweights.client.watching.metrics import TRAIN
from openweights.types import EventRecord

# A request reads this long; the page asks again for the rest of a long history.
READ_S = 0.8
_BLOCK = 2000
_MOST_JOBS = 200


@dataclass(slots=True)
class Series:
    """A measure of a job: `values` at `steps`, logged at `times` (seconds since the epoch)."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float, moment: float) -> None:
        """Append a point. One at or before the last step takes the place of what followed it: a
        later run that goes on from a checkpoint repeats steps.
        """
        if self.steps and step <= self.steps[-1]:
            keep = bisect_left(self.steps, step)
            del self.steps[keep:], self.values[keep:], self.times[keep:]
        self.steps.append(step)
        self.values.append(value)
        self.times.append(moment)


@dataclass(slots=True)
class JobSeries:
    """The series of one job, read so far.

    Attributes:
        by_name: `loss`, `eval/loss`, `multiple_choice/arc/accuracy`, …
        last_event: Id of the last event that was read.
        started: Moment of the first event.
        complete: Whether everything that the store held was read.
    """

    by_name: dict[str, Series] = field(default_factory=dict[str, Series])
    last_event: int = 0
    started: float | None = None
    complete: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, backend: Backend, job_id: str, seconds: float = READ_S) -> None:
        """Take in events that are new, for so many seconds at most."""
        until = time.monotonic() + seconds
        with self.lock:
            events = iter(backend.list_events(job_id=job_id, after=self.last_event))
            self.complete = False
            while block := list(islice(events, _BLOCK)):
                for event in block:
                    self._take(event)
                if time.monotonic() > until:
                    return
            self.complete = True

    def _take(self, event: EventRecord) -> None:
        self.last_event = event.id
        moment = event.created_at.timestamp()
        if self.started is None:
            self.started = moment
        for name, step, value in measures(event.data):
            self.by_name.setdefault(name, Series()).add(step, value, moment)


def measures(data: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """`(name, step, value)` of each number of an event that has a step.

    Names are `[type/][tag/]field`, without the tag `train`.
    """
    step = as_number(data.get("step"))
    if step is None:
        return
    kind, tag = data.get("type"), data.get("tag")
    parts = [str(part) for part in (kind, tag) if part and part != TRAIN]
    for key, value in data.items():
        number = None if key in ("step", "tag", "type") else as_number(value)
        if number is not None:
            yield "/".join([*parts, key]), step, number


class SeriesCache:
    """The series of the jobs that were looked at last, each read on from where it was."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, JobSeries] = OrderedDict()

    def of(self, job_id: str, seconds: float = READ_S) -> JobSeries:
        """The job's series, up to date or, for a long history, read a little further.

        Raises:
            NotFoundError: There is no such job.
        """
        with self._lock:
            known = self._jobs.setdefault(job_id, JobSeries())
            self._jobs.move_to_end(job_id)
            while len(self._jobs) > _MOST_JOBS:
                self._jobs.popitem(last=False)
        known.read(self._backend, job_id, seconds)
        return known


def thinned(xs: Sequence[float], ys: Sequence[float], buckets: int) -> list[int]:
    """Indices of the points that a chart of `buckets` pixels needs: of each bucket of equal width
    in x the first, the least, the greatest and the last, so that no peak is lost.

    Args:
        xs: Ascending.
    """
    count = len(xs)
    if count <= 4 * buckets:
        return list(range(count))
    low, width = xs[0], (xs[-1] - xs[0]) / buckets or 1.0
    kept: list[int] = []
    start = 0
    for bucket in range(buckets):
        stop = count if bucket == buckets - 1 else bisect_left(xs, low + (bucket + 1) * width)
        if stop > start:
            places = range(start, stop)
            least, greatest = min(places, key=ys.__getitem__), max(places, key=ys.__getitem__)
            kept += sorted({start, least, greatest, stop - 1})
        start = max(start, stop)
    return kept


def points(series: Series, buckets: int) -> dict[str, list[float | None]]:
    """`{step, value, time}`, thinned to a chart's pixels; values that are no finite numbers are
    None, a gap in the line.
    """
    chosen = thinned(series.steps, series.values, buckets)
    values = (series.values[i] for i in chosen)
    return {
        "step": [series.steps[i] for i in chosen],
        "value": [value if math.isfinite(value) else None for value in values],
        "time": [series.times[i] for i in chosen],
    }
