"""`ow logs`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

import click

from openweights.cli.output import note
from openweights.cli.store import JOB_ID, find_run
from openweights.client.jobs import find_job
from openweights.types import ENDED


@click.command()
@click.argument("job", type=JOB_ID)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--run-id", type=int, help="The log of this run; without it, of the last one.")
@click.option(
    "-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines."
)
def logs(job: str, follow: bool, run_id: int | None, tail: int | None) -> None:
    """Print the log of a job.

    Also while it runs: what it has written so far, or with -f as it comes.
    """
    from openweights.client import OpenWeights
    from openweights.client.jobs import POLL_S
    from openweights.client.results import read_log_chunks
    from openweights.client.watching.waiting import follow_log

    ow = OpenWeights()
    record = find_job(ow.backend, job)
    run = find_run(ow.backend, record, run_id)
    skipped = 0
    if tail is not None and run is not None:
        skipped = start_of_tail(read_log_chunks(ow.backend, run.id), tail)
    if follow:
        if run is None and record.status not in ENDED:
            note(f"job {record.id} is {record.status}: waiting for a worker")
        print_chunks(follow_log(ow, record.id, run_id, POLL_S, skipped=skipped))
    elif run is None:
        note(f"job {record.id} is {record.status} and has not run yet: there is no log")
    else:
        print_chunks(read_log_chunks(ow.backend, run.id, skipped))


def start_of_tail(chunks: Iterable[bytes], count: int) -> int:
    """Where the last `count` lines begin, in bytes; a line that has not ended yet is one."""
    starts = deque([0], maxlen=count + 1)
    end = 0
    for chunk in chunks:
        starts.extend(end + found.end() for found in re.finditer(b"\n", chunk))
        end += len(chunk)
    if starts[-1] != end:
        starts.append(end)
    return starts[0]


def print_chunks(chunks: Iterable[str | bytes]) -> None:
    """Print pieces of a log as they come, adding nothing."""
    for chunk in chunks:
        click.echo(chunk, nl=False)
