"""Between the JSON of a Supabase project and the records of `openweights.types`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol, TypeVar

from openweights.backends.values import check_moment
from openweights.json_values import to_json
from openweights.types import Claim, EventDraft, JobRecord, JobSpec, RunRecord, WorkerSpec


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=_Dataclass)
Row = Mapping[str, Any]


def columns(record: type[_Dataclass]) -> str:
    """The columns to select for a record: they are called like its fields."""
    return ",".join(field.name for field in fields(record))


def from_row(record: type[R], row: Row) -> R:
    """A record from a row, or from what a function returned."""
    return record(**{f.name: _value(f.name, row[f.name]) for f in fields(record)})


def claim_of(answer: Mapping[str, Row]) -> Claim:
    return Claim(from_row(JobRecord, answer["job"]), from_row(RunRecord, answer["run"]))


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name.endswith("_at"):
        return datetime.fromisoformat(value).astimezone(UTC)
    return tuple(value) if name == "allowed_hardware" else value


def spec_json(spec: JobSpec) -> dict[str, Any]:
    """A job as `submit_job` takes it.

    Raises:
        InvalidInputError: `params` is no JSON, or the moment has no time zone.
    """
    values = {field.name: getattr(spec, field.name) for field in fields(JobSpec)}
    values["params"] = dict(spec.params)
    values["timeout_at"] = None if spec.timeout_at is None else moment_text(spec.timeout_at)
    return plain(values, "params")


def worker_json(worker: WorkerSpec) -> dict[str, Any]:
    """A worker as `register_worker` takes it."""
    values = {field.name: getattr(worker, field.name) for field in fields(WorkerSpec)}
    return plain(values, "worker")


def event_json(event: EventDraft) -> dict[str, Any]:
    """An event as `append_events` takes it.

    Raises:
        InvalidInputError: Its data is no JSON, or its moment has no time zone.
    """
    return {
        "key": event.key,
        "data": plain(dict(event.data), "an event's data"),
        "created_at": moment_text(event.created_at),
    }


def moment_text(moment: datetime) -> str:
    return check_moment(moment).isoformat()


def plain(value: Any, what: str) -> Any:
    """A copy of `value` that is JSON as PostgreSQL can hold it.

    Raises:
        InvalidInputError: `what` is no JSON.
    """
    return json.loads(to_json(value, what))
