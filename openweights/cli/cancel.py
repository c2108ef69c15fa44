"""`ow cancel`."""

from __future__ import annotations

import click

from openweights.cli.change import change_jobs
from openweights.cli.output import json_option
from openweights.cli.store import open_store


@click.command()
@click.argument("jobs", nargs=-1)
@json_option
def cancel(jobs: tuple[str, ...], as_json: bool) -> None:
    """Cancel jobs.

    Without JOBS, their ids are read from standard input: `ow ls -q --status pending | ow cancel`.
    """
    with open_store() as backend:
        change_jobs(backend, jobs, lambda job: backend.cancel_job(job.id), as_json=as_json)
