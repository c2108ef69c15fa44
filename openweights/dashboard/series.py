"""Every number that a job has logged, as series over its steps, thinned for a chart's pixels.

A history is read once, from where the last look ended, and kept thinned: a measure of a million
steps takes as much memory as one of some ten thousand.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from openweights.backends.base import Backend
from openweights.client.watching.metrics import Blocks, measures, series_name
from openweights.client.watching.panels import layout, measure_rank
from openweights.types import EventRecord

# A request reads this long; the page asks again for the rest of a long history.
READ_S = 0.8
_BLOCK = 2000
_MOST_JOBS = 200
# A series of more points is thinned to those that a chart of `_KEPT_BUCKETS` pixels needs.
_MOST_POINTS = 1 << 15
_KEPT_BUCKETS = 1 << 12


@dataclass(slots=True)
class Series:
    """A measure of a job: `values` at ascending `steps`, logged at `times` (seconds since the
    epoch).

    Attributes:
        run_id: Whose point was added last.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))
    run_id: int = 0

    def add(self, step: float, value: float, moment: float, run_id: int) -> None:
        """Append a point. A later run goes on from a checkpoint: its first point ends what earlier
        ones had behind it. Within a run the last value of a step counts.
        """
        if self.steps and step <= self.steps[-1]:
            place = bisect_left(self.steps, step)
            stop = len(self.steps) if run_id != self.run_id else place + (self.steps[place] == step)
            for column, item in self._columns(step, value, moment):
                column[place:stop] = array("d", [item])
        else:
            for column, item in self._columns(step, value, moment):
                column.append(item)
        self.run_id = run_id
        if len(self.steps) > _MOST_POINTS:
            self._keep(thinned(self.steps, self.values, _KEPT_BUCKETS))

    def _columns(self, *point: float) -> Iterator[tuple[array[float], float]]:
        return zip((self.steps, self.values, self.times), point, strict=True)

    def _keep(self, chosen: Sequence[int]) -> None:
        for column in (self.steps, self.values, self.times):
            column[:] = array("d", [column[i] for i in chosen])

    def ends(self) -> tuple[float | None, float | None]:
        """The first and the last value that are finite numbers; None where there are none."""
        finite = (value for value in self.values if math.isfinite(value))
        last = (value for value in reversed(self.values) if math.isfinite(value))
        return next(finite, None), next(last, None)


@dataclass(slots=True)
class JobSeries:
    """The series of one job, read so far.

    Attributes:
        by_name: `loss`, `eval_loss`, `multiple_choice/accuracy[arc]`, …
        last_event: Id of the last event that was read.
        started: Moment of the first event.
        complete: Whether everything that the store held was read.
    """

    by_name: dict[str, Series] = field(default_factory=dict[str, Series])
    last_event: int = 0
    started: float | None = None
    complete: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    _blocks: Blocks = field(default_factory=Blocks)

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
        step, tag, numbers = measures(event, self._blocks)
        if step is None:
            return
        for name, value in numbers.items():
            key = series_name(name, tag)
            if key not in self.by_name:
                self.by_name[key] = Series()
            self.by_name[key].add(step, value, moment, event.run_id)

    def names(self) -> list[str]:
        """Of its measures, those first that were measured first."""
        with self.lock:
            return [*self.by_name]

    def shown(self, names: Collection[str] | None, buckets: int) -> dict[str, Any]:
        """`{complete, version, started, measures: {name: [first, last, rank]}, series: {name:
        points}}`; those of the least rank come first.

        Args:
            names: Of the series; None for all.
            buckets: As of `points`.
        """
        with self.lock:
            wanted = self.by_name if names is None else [n for n in self.by_name if n in names]
            ends = {name: (*one.ends(), measure_rank(name)) for name, one in self.by_name.items()}
            return {
                "complete": self.complete,
                "version": self.last_event,
                "started": self.started,
                "measures": ends,
                "series": {name: points(self.by_name[name], buckets) for name in wanted},
            }

    def panels(self, *, shares_loss: bool) -> dict[str, Any]:
        """Where the job's page shows what, as `Layout` says: `{panels, more, still}`, each a list
        of `[title, [[label, name of the series], …]]`.
        """
        with self.lock:
            curves = {name: (one.steps, one.values) for name, one in self.by_name.items()}
            found = layout(curves, shares_loss=shares_loss)
        kinds = {"panels": found.panels, "more": found.more, "still": found.still}
        return {
            kind: [[title, [[line.label, line.name] for line in own]] for title, own in of.items()]
            for kind, of in kinds.items()
        }


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
        if stop - start > 4:  # noqa: PLR2004 - as many as are kept
            places = range(start, stop)
            least, greatest = min(places, key=ys.__getitem__), max(places, key=ys.__getitem__)
            kept += sorted({start, least, greatest, stop - 1})
        else:
            kept += range(start, stop)
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
