"""Opening the store for a command, and finding jobs and runs by what people type."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from openweights.backends.local.worker_locks import has_lost_its_worker
from openweights.cli.output import note
from openweights.errors import NotFoundError, OpenWeightsError
from openweights.settings import Settings
from openweights.types import JobRecord, RunRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend


_SUGGESTED = 3  # jobs, where one is missing


@contextmanager
def open_store() -> Generator[Backend]:
    """The store that the environment names, closed afterwards."""
    from openweights.backends import open_backend

    backend = open_backend(Settings.from_env())
    try:
        yield backend
    finally:
        backend.close()


def take_up_lost_jobs() -> None:
    """Whatever the command: after a reboot, the first one has the jobs on this machine go on."""
    # What is wrong with the store is the command's to say.
    with suppress(OpenWeightsError, OSError):
        settings = Settings.from_env()
        if settings.is_remote or not has_lost_its_worker(settings.home):
            return
        from openweights.client.local_worker import take_up

        if take_up(settings):
            note("jobs were waiting without a worker; started one")


def where() -> str:
    """What the store is called where it turns out to be empty: its address may be mistyped."""
    settings = Settings.from_env()
    return "the project's store" if settings.is_remote else f"the store in {settings.home}"


def is_remote() -> bool:
    """Whether that store is a project's, and not the one on this machine."""
    return Settings.from_env().is_remote


def complete_jobs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of jobs for a shell's completion, with what they are; none when the store is away."""
    try:
        with open_store() as backend:
            jobs = backend.list_jobs(limit=None)
    except OpenWeightsError:
        return []
    return [
        CompletionItem(job.id, help=f"{job.status} {job.model or ''}".strip())
        for job in jobs
        if job.id.startswith(incomplete)
    ]


class JobId(click.types.StringParamType):
    """A job's id or its beginning: the shell completes it, and one that is missing is suggested."""

    name = "job"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return complete_jobs(ctx, param, incomplete)

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        try:
            with open_store() as backend:
                jobs = backend.list_jobs(limit=_SUGGESTED)
        except OpenWeightsError:
            jobs = []
        ids = ", ".join(job.id for job in jobs)
        return f"The last changed are {ids}." if ids else f"There are no jobs yet in {where()}."


JOB_ID = JobId()


def find_run(backend: Backend, job: JobRecord, run_id: int | None) -> RunRecord | None:
    """The run `run_id` of the job; without an id its last run, or None when it has none.

    Raises:
        NotFoundError: The job has no such run.
    """
    runs = backend.list_runs(job_id=job.id)
    if run_id is None:
        return runs[-1] if runs else None
    for run in runs:
        if run.id == run_id:
            return run
    known = ", ".join(str(run.id) for run in runs) or "none"
    raise NotFoundError(f"job {job.id} has no run {run_id}; its runs: {known}")
