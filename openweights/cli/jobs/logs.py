"""`ow logs`."""

from __future__ import annotations

from collections.abc import Iterable

import click

from openweights.cli.output import note
from openweights.cli.store import complete_jobs, find_run
from openweights.client.jobs import find_job
from openweights.types import ENDED


@click.command()
@click.argument("job", shell_complete=complete_jobs)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--run-id", type=int, help="The log of this run; without it, of the last one.")
def logs(job: str, follow: bool, run_id: int | None) -> None:
    """Print the log of a job.

    Also while it runs: what it has written so far, or with -f as it comes.
    """
    from openweights.client import OpenWeights
    from openweights.client.results import read_log_chunks

    ow = OpenWeights()
    record = find_job(ow.backend, job)
    run = find_run(ow.backend, record, run_id)
    if follow:
        if run is None and record.status not in ENDED:
            note(f"job {record.id} is {record.status}: waiting for a worker")
        print_chunks(ow.jobs.retrieve(record.id).logs(follow=True, run_id=run_id))
    elif run is None:
        note(f"job {record.id} is {record.status} and has not run yet: there is no log")
    else:
        print_chunks(read_log_chunks(ow.backend, run.id))


def print_chunks(chunks: Iterable[str | bytes]) -> None:
    """Print pieces of a log as they come, adding nothing."""
    for chunk in chunks:
        click.echo(chunk, nl=False)
