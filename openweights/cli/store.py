"""Opening the store for a command, and finding jobs and runs by what people type."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from openweights.cli.output import one_line
from openweights.errors import InvalidInputError, NotFoundError
from openweights.settings import Settings
from openweights.types import JobRecord, RunRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHOWN = 4  # ids named when a prefix fits several jobs


@contextmanager
def open_store() -> Generator[Backend]:
    """The store that the environment names, closed afterwards."""
    from openweights.backends import open_backend

    backend = open_backend(Settings.from_env())
    try:
        yield backend
    finally:
        backend.close()


def find_job(backend: Backend, text: str) -> JobRecord:
    """The job of that id, or the only one whose id begins so.

    Raises:
        InvalidInputError: No id looks like this, or several jobs begin so.
        NotFoundError: No job begins so.
    """
    if not _JOB_ID.fullmatch(text):
        raise InvalidInputError(f"{one_line(repr(text), 80)} is not a job id; `ow ls` lists them")
    try:
        return backend.get_job(text)
    except NotFoundError:
        found = [job for job in backend.list_jobs(limit=None) if job.id.startswith(text)]
    if not found:
        raise NotFoundError(f"no job {one_line(text, 80)}; `ow ls` lists them")
    if len(found) > 1:
        names = sorted(job.id for job in found)
        shown = ", ".join(names[:_SHOWN] + ["…"] * (len(names) > _SHOWN))
        raise InvalidInputError(f"{text} begins {len(names)} job ids: {shown}; type more of it")
    return found[0]


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
