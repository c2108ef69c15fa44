"""`ow.events`: what runs have logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from openweights.arguments import as_texts, check_text, check_whole
from openweights.errors import InvalidInputError
from openweights.types import EventRecord

if TYPE_CHECKING:
    from openweights.client import OpenWeights


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
        if type is not None:
            check_text("type", type, "`openweights.events` lists the types")
        after = check_whole("after", after)
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
        names = as_texts("fields", fields, "give names, such as ['loss'], or '*'")
        keys = None if names == ["*"] else names
        return self._ow.backend.latest_values(keys, job_id=job_id, run_id=run_id)


def _check_one(job_id: str | None, run_id: int | None) -> None:
    if (job_id is None) == (run_id is None):
        raise InvalidInputError("name a job or a run: pass job_id=… or run_id=…, one of them")
    if job_id is not None:
        check_text("job_id", job_id, "`ow.jobs.list()` lists them")
    if run_id is not None:
        check_whole("run_id", run_id)
