"""`ow cancel` and `ow restart`: ids from anywhere, a result for each."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from openweights.cli.output import json_option, local_time, note, one_line, print_json, print_table
from openweights.cli.store import JOB_ID, open_store
from openweights.client.jobs import find_job
from openweights.errors import InvalidInputError, InvalidStateError, NotFoundError
from openweights.types import AuditRecord, JobRecord, QueueState

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.client import OpenWeights


@click.command()
@click.argument("jobs", nargs=-1, type=JOB_ID)
@json_option
def cancel(jobs: tuple[str, ...], as_json: bool) -> None:
    """Cancel jobs.

    Without JOBS, their ids are read from standard input: `ow ls -q --status pending | ow cancel`.
    """
    with open_store() as backend:
        named = _last_first(backend, jobs or _ids_from_stdin())
        change_jobs(backend, named, lambda job: backend.cancel_job(job.id).status, as_json=as_json)


def _last_first(backend: Backend, named: Sequence[str]) -> list[str]:
    """Jobs that were submitted last come first: one that waits for another is then canceled before
    that one, and does not fail for it. What is no job comes at the end.
    """

    def age(text: str) -> float:
        try:
            return -find_job(backend, text).created_at.timestamp()
        except (NotFoundError, InvalidInputError):
            return math.inf

    return sorted(named, key=age)


@click.command()
@click.argument("jobs", nargs=-1, type=JOB_ID)
@json_option
def restart(jobs: tuple[str, ...], as_json: bool) -> None:
    """Restart failed or canceled jobs.

    Without JOBS, their ids are read from standard input: `ow ls -q --status failed | ow restart`.
    `ow resume` lets a queue go on that was paused.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    change_jobs(ow.backend, jobs, lambda job: _restart(ow, job), as_json=as_json)


def _restart(ow: OpenWeights, job: JobRecord) -> str:
    if job.status == "pending" and ow.jobs.queue().paused_at is not None:
        raise InvalidStateError("it waits since the queue is paused: `ow resume`")
    return ow.jobs.restart(job.id).status


@click.command(context_settings={"allow_extra_args": True})
@json_option
@click.pass_context
def pause(context: click.Context, as_json: bool) -> None:
    """Give out no new jobs until `ow resume`; what runs goes on."""
    _check_no_job(context, "`ow cancel JOB` stops one")
    with open_store() as backend:
        _print_queue(backend.set_paused(True), as_json=as_json)


@click.command(context_settings={"allow_extra_args": True})
@json_option
@click.pass_context
def resume(context: click.Context, as_json: bool) -> None:
    """Give out jobs again."""
    _check_no_job(context, "`ow restart JOB` queues one again")
    from openweights.client import OpenWeights

    _print_queue(OpenWeights().jobs.resume(), as_json=as_json)


def _check_no_job(context: click.Context, remedy: str) -> None:
    if context.args:
        raise click.UsageError(f"it takes no JOB, as it is about all that wait; {remedy}")


def _print_queue(state: QueueState, *, as_json: bool) -> None:
    if as_json:
        print_json(state)
    elif state.paused_at is None:
        click.echo("the queue goes on")
    else:
        click.echo(f"the queue is paused since {local_time(state.paused_at)}")


@click.command()
@click.argument("target", required=False)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="At most so many changes.",
)
@json_option
def audit(target: str | None, limit: int, as_json: bool) -> None:
    """Show who did what, the last first.

    Of everything, or of TARGET: a job, the name of a key or secret, a member's e-mail address.
    """
    with open_store() as backend:
        changes = backend.list_audit(target=target, limit=limit)
    if as_json:
        print_json(changes)
    elif changes:
        rows = [_change_row(change) for change in changes]
        print_table(("when", "who", "key", "what", "of", "details"), rows)
    else:
        note("nothing has been changed" + (f" of {one_line(target, 80)}" if target else " yet"))


def _change_row(change: AuditRecord) -> tuple[str, ...]:
    details = " ".join(f"{name}={value}" for name, value in change.details.items())
    return (
        local_time(change.created_at),
        *(one_line(text or "-") for text in (change.who, change.key_name)),
        *(one_line(text or "-") for text in (change.action, change.target, details)),
    )


def change_jobs(
    backend: Backend,
    given: Sequence[str],
    change: Callable[[JobRecord], str],
    *,
    as_json: bool,
) -> None:
    """Apply `change` to each job and say what it answers; exit with 1 if it failed for one."""
    results: list[dict[str, str | None]] = []
    for text in given or _ids_from_stdin():
        try:
            job = find_job(backend, text)
            status = change(job)
        except (NotFoundError, InvalidInputError, InvalidStateError) as error:
            results.append({"id": text, "status": None, "error": one_line(error)})
            said = str(error)
            note(said if text in said else f"{one_line(text, 80)}: {said}")
            continue
        results.append({"id": job.id, "status": status, "error": None})
        if not as_json:
            click.echo(f"{job.id}  {status}")
    if as_json:
        print_json(results)
    if any(result["error"] for result in results):
        sys.exit(1)


def _ids_from_stdin() -> list[str]:
    """The first word of each line, so that the table of `ow ls` will do as well as its ids."""
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("name at least one job, or pipe ids in")
    lines = sys.stdin.buffer.read().decode(errors="replace").splitlines()
    words = [line.split()[0] for line in lines if line.strip()]
    ids = [word for word in words if word != "ID"]  # the heading of the table
    if not words:
        raise click.UsageError("no job ids: none were named, and standard input is empty")
    return list(dict.fromkeys(ids))
