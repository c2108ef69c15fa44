"""`ow.events`: what runs have logged, and the table of metrics that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from openweights.client.event_json import as_number
from openweights.errors import InvalidInputError
from openweights.types import EventRecord

if TYPE_CHECKING:
    from openweights.client import OpenWeights

DEFAULT_TAG = "train"


class EventCollection:
    """The events of the organization's runs."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow

    def list(
        self, job_id: str | None = None, run_id: int | None = None, type: str | None = None
    ) -> list[EventRecord]:
        """The events of a run, or of all runs of a job, oldest first.

        Args:
            type: Only events of this type; `openweights.events` lists the types.

        Raises:
            InvalidInputError: Not exactly one of `job_id` and `run_id` was given.
        """
        return list(self.iterate(job_id, run_id, type=type))

    def iterate(
        self,
        job_id: str | None = None,
        run_id: int | None = None,
        after: int = 0,
        type: str | None = None,
    ) -> Iterator[EventRecord]:
        """As `list`, page by page, of events with an id above `after`."""
        _check_one(job_id, run_id)
        return self._ow.backend.list_events(job_id=job_id, run_id=run_id, after=after, type=type)

    def latest(
        self,
        fields: Sequence[str] | Literal["*"] = "*",
        job_id: str | None = None,
        run_id: int | None = None,
    ) -> dict[str, Any]:
        """The last value of each field over the events of a run, or of a job's last run.

        Args:
            fields: Names, one name, or "*" for all.
        """
        _check_one(job_id, run_id)
        names = [fields] if isinstance(fields, str) else list(fields)
        keys = None if names == ["*"] else names
        return self._ow.backend.latest_values(keys, job_id=job_id, run_id=run_id)


def metric_rows(events: Iterable[EventRecord]) -> list[dict[str, Any]]:
    """One row for each (step, tag): `{"step", "tag", <metric>: number, …}`, by step.

    Only events with a whole `step`, another number, and no `type` are metrics. A step that a later
    run repeats replaces the earlier run's; within a run its events are merged.
    """
    rows: dict[tuple[int, str], tuple[int, dict[str, Any]]] = {}
    tags: dict[str, int] = {}
    for event in events:
        found = _metrics(event)
        if found is None:
            continue
        step, tag, numbers = found
        tags.setdefault(tag, len(tags))
        run_id, row = rows.get((step, tag), (event.run_id, {}))
        row = row if run_id == event.run_id else {}
        rows[step, tag] = (event.run_id, {**row, "step": step, "tag": tag, **numbers})
    ordered = sorted(rows, key=lambda key: (key[0], tags[key[1]]))
    return [rows[key][1] for key in ordered]


def _metrics(event: EventRecord) -> tuple[int, str, dict[str, float]] | None:
    step, kind = event.data.get("step"), event.data.get("type")
    if not isinstance(step, int) or isinstance(step, bool) or kind is not None:
        return None
    numbers: dict[str, float] = {}
    for key, value in event.data.items():
        number = None if key in ("step", "tag") else as_number(value)
        if number is not None:
            numbers[key] = number
    if not numbers:
        return None
    return step, str(event.data.get("tag") or DEFAULT_TAG), numbers


def _check_one(job_id: str | None, run_id: int | None) -> None:
    if (job_id is None) == (run_id is None):
        raise InvalidInputError("name a job or a run: pass job_id=… or run_id=…, one of them")
