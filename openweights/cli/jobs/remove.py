"""`ow rm` and `ow gc`: what is no longer needed goes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from openweights.backends.values import LEAST_KEEP_S
from openweights.cli.jobs.change import change_jobs
from openweights.cli.output import json_option, plain, print_json
from openweights.cli.store import JOB_ID, open_store
from openweights.client.serving.sampling import old_samples
from openweights.errors import InvalidInputError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.types import JobRecord

DEFAULT_DAYS = 30.0
_DAY_S = 86_400.0


@click.command()
@click.argument("jobs", nargs=-1, type=JOB_ID)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def rm(jobs: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Delete jobs that have ended, with their runs, events and logs.

    Without JOBS, their ids are read from standard input: `ow ls -q --status failed | ow rm --yes`.
    Files that only they name go with the next `ow gc`.
    """
    with open_store() as backend:
        change_jobs(backend, jobs, lambda job: _delete(backend, job, yes), as_json=as_json)


def _delete(backend: Backend, job: JobRecord, yes: bool) -> str:
    if not yes and not (sys.stdin is not None and sys.stdin.isatty()):
        raise InvalidInputError("not deleted: nobody can be asked here; add --yes")
    if not yes and not click.confirm(f"delete {job.id} ({job.status})?", err=True):
        return "kept"
    backend.delete_job(job.id)
    return "deleted"


@click.command()
@click.option(
    "--keep-days",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help=f"Default: OPENWEIGHTS_KEEP_DAYS, else {DEFAULT_DAYS:g}.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def gc(keep_days: float | None, dry_run: bool, as_json: bool) -> None:
    """Remove old logs, and old files that nobody needs.

    These are files that no job and no event names, such as uploads that were never used and results
    of deleted jobs; checkpoints of jobs that have ended; logs, of which a line is left; and the
    jobs that `job.sample` has made for itself. Results and kept checkpoints stay, and so does what
    a waiting or running job names, and what is younger than an hour. In a project it takes an
    admin's key.
    """
    settings = Settings.from_env()
    days = settings.keep_days if keep_days is None else keep_days
    keep_s = (DEFAULT_DAYS if days is None else days) * _DAY_S
    with open_store() as backend:
        samples = old_samples(backend, keep_s)
        for job in () if dry_run else samples:
            backend.delete_job(job.id)
        found = backend.collect_garbage(keep_s, dry_run=dry_run)
    if as_json:
        print_json({**plain(found), "jobs": len(samples)})
        return
    verb = "would go" if dry_run else "removed"
    click.echo(
        f"{verb}: {found.files} files ({in_bytes(found.file_bytes)}), "
        f"{found.logs} logs ({in_bytes(found.log_bytes)})"
        + (f", {len(samples)} jobs of job.sample" if samples else "")
    )
    if days is not None and days * _DAY_S < LEAST_KEEP_S:
        click.echo("what is younger than an hour is kept", err=True)


def in_bytes(size: int) -> str:
    """A size for people: `512 B`, `3.4 MB`."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
