"""`ow restart`."""

from __future__ import annotations

import click

from openweights.cli.change import change_jobs
from openweights.cli.output import json_option


@click.command()
@click.argument("jobs", nargs=-1)
@json_option
def restart(jobs: tuple[str, ...], as_json: bool) -> None:
    """Restart failed or canceled jobs.

    Without JOBS, their ids are read from standard input: `ow ls -q --status failed | ow restart`.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    change_jobs(ow.backend, jobs, lambda job: ow.jobs.restart(job.id), as_json=as_json)
