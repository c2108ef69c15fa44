"""Between the JSON of a Supabase project and the records of `openweights.types`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol, TypeVar

from openweights.backends.values import (
    FIRST_MOMENT,
    LAST_MOMENT,
    base_name,
    check_moment,
    check_spec,
    check_worker,
    moment_within,
    readable,
    retry_from_json,
)
from openweights.json_values import storable, to_json
from openweights.types import Claim, EventDraft, JobRecord, JobSpec, RunRecord, WorkerSpec


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=_Dataclass)
Row = Mapping[str, Any]


def columns(record: type[_Dataclass]) -> str:
    """The columns to select for a record: they are called like its fields."""
    return ",".join(field.name for field in fields(record))


def from_row(record: type[R], row: Row) -> R:
    """A record from a row, or from what a function returned. What a project of a version before
    does not tell of is as it is by default.
    """
    told = [f for f in fields(record) if f.name in row or f.default is MISSING]
    return record(**{f.name: _value(f.name, row[f.name]) for f in told})


def from_rows(record: type[R], rows: Iterable[Row]) -> list[R]:
    """The records of those rows that can be read."""
    return list(readable(lambda row: from_row(record, row), rows, record.__name__))


def claim_of(answer: Mapping[str, Row]) -> Claim:
    return Claim(from_row(JobRecord, answer["job"]), from_row(RunRecord, answer["run"]))


def _value(name: str, value: Any) -> Any:
    if name == "after":
        return tuple(str(item) for item in value or ())
    if value is None:
        return None
    if name == "retry":
        return retry_from_json(value)
    if name.endswith("_at") or name == "not_before":
        return moment(str(value))
    if name == "allowed_hardware":
        return tuple(str(item) for item in value)
    return base_name(value) if name == "filename" else value


def moment(text: str) -> datetime:
    """PostgreSQL has moments that Python has not: they are read as the nearest of ours."""
    if text.startswith("-") or text.endswith("BC"):
        return FIRST_MOMENT
    if text == "infinity" or re.match(r"\d{5,}-", text):
        return LAST_MOMENT
    return moment_within(datetime.fromisoformat(text).astimezone(UTC))


def spec_json(spec: JobSpec) -> dict[str, Any]:
    """A job as `submit_job` takes it.

    Raises:
        InvalidInputError: `params` is no JSON, or the moment has no time zone.
    """
    check_spec(spec)
    values = {field.name: getattr(spec, field.name) for field in fields(JobSpec)}
    values["params"] = dict(spec.params)
    for name in ("timeout_at", "not_before"):
        values[name] = None if values[name] is None else moment_text(values[name])
    values["retry"] = None if spec.retry is None else asdict(spec.retry)
    return plain(values, "params")


def worker_json(worker: WorkerSpec) -> dict[str, Any]:
    """A worker as `register_worker` takes it."""
    check_worker(worker)
    values = {field.name: getattr(worker, field.name) for field in fields(WorkerSpec)}
    return plain(values, "worker")


def event_json(event: EventDraft) -> dict[str, Any]:
    """An event as `append_events` takes it.

    Raises:
        InvalidInputError: Its data is no JSON, or its moment has no time zone.
    """
    return {
        "key": storable(event.key),
        "data": plain(dict(event.data), "an event's data"),
        "created_at": moment_text(moment_within(event.created_at)),
    }


def moment_text(moment: datetime) -> str:
    return check_moment(moment).isoformat()


def plain(value: Any, what: str) -> Any:
    """A copy of `value` that is JSON as PostgreSQL can hold it.

    Raises:
        InvalidInputError: `what` is no JSON.
    """
    return json.loads(to_json(value, what))
