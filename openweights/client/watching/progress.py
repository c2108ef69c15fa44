"""The progress bar of `job.wait`: on a terminal only, and with a total once the job's events name
one.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from openweights.client.event_json import as_number
from openweights.types import EventRecord, JobRecord

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Keys of an event that say how many steps there will be.
_TOTALS = ("max_steps", "total_steps", "total")


class NoProgress:
    """What is shown when nobody looks: nothing."""

    def see(self, event: EventRecord) -> None:
        """Take note of an event."""

    def show(self, job: JobRecord) -> None:
        """Show how the job stands."""


class BarProgress(NoProgress):
    """A bar on stderr."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._run_id = 0
        self._step = 0
        self._total: float | None = None
        self._loss: float | None = None

    def see(self, event: EventRecord) -> None:
        if event.run_id != self._run_id:
            self._run_id, self._step = event.run_id, 0
        for key in _TOTALS:
            total = as_number(event.data.get(key))
            if total is not None and total > 0:
                self._total = total
        step = event.data.get("step")
        if isinstance(step, int):
            self._step = max(self._step, step)
        loss = as_number(event.data.get("loss"))
        self._loss = self._loss if loss is None else loss

    def show(self, job: JobRecord) -> None:
        words = job.status.replace("_", " ")
        if self._loss is not None:
            words += f" · loss {self._loss:.4g}"
        if self._total is None and self._step:
            words += f" · step {self._step}"
        # Without a total the bar pulses; there is none for a job that nobody knows the length of.
        self._progress.update(self._task, completed=self._step, total=self._total, status=words)


@contextmanager
def open_progress(job_id: str) -> Generator[NoProgress]:
    """A bar if stderr is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield BarProgress(progress, progress.add_task(job_id, total=None, status="pending"))
