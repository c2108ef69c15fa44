"""`ow events`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from openweights.cli.output import compact, json_option, local_time, print_json_array, printable
from openweights.cli.store import JOB_ID, find_run, open_store
from openweights.client.jobs import find_job
from openweights.types import EventRecord

_FIRST = ("step", "tag", "type")  # keys that say what an event is about come before the values


@click.command()
@click.argument("job", type=JOB_ID)
@click.option("--run-id", type=int, help="Only the events of this run; without it, of all runs.")
@click.option("--type", "type_", help="Only events of this type.")
@click.option("--tag", help="Only events with this tag.")
@json_option
def events(job: str, run_id: int | None, type_: str | None, tag: str | None, as_json: bool) -> None:
    """Print what a job has logged.

    An event a line, oldest first: when, the run, and its values.
    """
    with open_store() as backend:
        record = find_job(backend, job)
        if run_id is None:
            found = backend.list_events(job_id=record.id, type=type_)
        else:
            find_run(backend, record, run_id)
            found = backend.list_events(run_id=run_id, type=type_)
        matching = _tagged(found, tag)
        if as_json:
            print_json_array(matching)
            return
        for event in matching:
            click.echo(f"{local_time(event.created_at)}  run {event.run_id}  {_line(event.data)}")


def _tagged(events: Iterator[EventRecord], tag: str | None) -> Iterator[EventRecord]:
    return (event for event in events if tag is None or str(event.data.get("tag")) == tag)


def _line(data: Mapping[str, Any]) -> str:
    keys = [key for key in _FIRST if key in data] + [key for key in data if key not in _FIRST]
    return " ".join(f"{printable(key)}={compact(data[key])}" for key in keys)
