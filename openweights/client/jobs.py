"""`ow.jobs`: the collection of all jobs, and `Job`, what you hold of one of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from openweights.arguments import (
    as_path,
    check_known,
    check_limit,
    check_seconds,
    check_text,
    check_whole,
)
from openweights.client.params import plain
from openweights.client.results import read_log_chunks, write_log, write_results, write_table
from openweights.client.watching.estimates import Estimate
from openweights.client.watching.metrics import Row, metric_rows
from openweights.client.watching.waiting import follow_log, wait_for
from openweights.errors import InvalidInputError, InvalidStateError, NotFoundError, shown
from openweights.events import TeacherGate
from openweights.types import (
    JOB_STATUSES,
    EventRecord,
    JobRecord,
    JobStatus,
    JobType,
    QueueState,
    Retry,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from openweights.backends.base import Backend
    from openweights.client import OpenWeights
    from openweights.client.runs import Run
    from openweights.client.serving.sampling import Prompt, Sample
    from openweights.client.watching.panels import GateBars

POLL_S = 0.5
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_PANELS = 15  # of a figure
_FILE_ID = re.compile(r"[a-z_]+:\S+", re.ASCII)
_SHOWN = 4  # ids named when a prefix fits several jobs, or none
_ALIKE = 0.75
_LEAST_DIGITS = 3  # of an id that say which was meant
_LONGEST_TYPED = 100


class Job:
    """A job. Fields of its record are attributes, and can be read by indexing: `job["status"]`.

    It shows the job as it was when read; `refresh` and `wait` read it again.
    """

    id: str
    type: JobType
    status: JobStatus
    model: str | None
    script: str
    params: Mapping[str, Any]
    outputs: Mapping[str, Any] | None
    docker_image: str
    requires_vram_gb: int
    allowed_hardware: tuple[str, ...] | None
    bundle_file: str | None
    priority: int
    attempts: int
    max_attempts: int
    organization_id: str
    worker_id: str | None
    timeout_at: datetime | None
    max_cost_usd: float | None
    after: tuple[str, ...]
    failed_by: str | None
    not_before: datetime | None
    label: str | None
    max_running: int | None
    max_duration_s: float | None
    stall_timeout_s: float | None
    retry: Retry | None
    retries: int
    max_usd_per_hour: float | None
    created_at: datetime
    updated_at: datetime

    def __init__(self, ow: OpenWeights, record: JobRecord) -> None:
        self._ow = ow
        self.record = record

    def __getattr__(self, name: str) -> Any:
        # Called for what is no ordinary attribute: the fields of the record.
        if name.startswith("_") or name == "record" or not hasattr(self.record, name):
            raise AttributeError(f"a job has no {name!r}")
        return getattr(self.record, name)

    def __getitem__(self, name: str) -> Any:
        if not _is_field(name):
            raise KeyError(name)
        return getattr(self.record, name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field of its record, as of a dict."""
        return getattr(self.record, name) if _is_field(name) else default

    def __repr__(self) -> str:
        return f"Job({self.id}, {self.status})"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *JobRecord.__dataclass_fields__})

    @property
    def runs(self) -> list[Run]:
        """All its runs, oldest first."""
        return self._ow.runs.list(job_id=self.id, limit=None)

    @property
    def estimate(self) -> Estimate | None:
        """What it was likely to take when it was submitted: steps, seconds, memory and price as far
        as they were known then; None for kinds of jobs that nobody estimates.
        """
        return Estimate.of(self.record.params)

    # ---- changing it -----------------------------------------------------------------------------

    def cancel(self) -> Job:
        """Stop it, or take it out of the queue.

        Raises:
            InvalidStateError: It has completed or failed.
        """
        self.record = self._ow.backend.cancel_job(self.id)
        return self

    def restart(self) -> Job:
        """Queue it again after it failed or was canceled; it resumes from its last checkpoint.

        Raises:
            InvalidStateError: It is pending, in progress or completed, or a job that it waits for
                has failed or was canceled: restart that one, which restarts this one, too.
        """
        self.record = self._ow.backend.restart_job(self.id)
        self._ow.ensure_worker()
        return self

    def delete(self) -> None:
        """Remove it with its runs, events and logs, once it has ended. Files that only it names go
        with `ow gc`.

        Raises:
            InvalidStateError: It has not ended, or a job that has not ended names it.
        """
        self._ow.backend.delete_job(self.id)

    def set_timeout(self, timeout: float | None) -> Job:
        """Stop it so many seconds from now, if it has not ended by then; None lets it run."""
        moment = moment_after(self._ow.backend, "timeout", timeout)
        self.record = self._ow.backend.set_timeout(self.id, moment)
        return self

    def refresh(self) -> Job:
        """Read it again, in place."""
        self.record = self._ow.backend.get_job(self.id)
        return self

    # ---- watching it -----------------------------------------------------------------------------

    def wait(
        self,
        timeout: float | None = None,
        on_event: Callable[[EventRecord], None] | None = None,
        poll_s: float = POLL_S,
    ) -> Job:
        """Wait until it has completed, with a progress bar when stderr is a terminal.

        Ctrl-C stops the waiting, not the job.

        Args:
            timeout: Seconds; None waits for ever.
            on_event: Called with each event of the job, from its first one on, in order and once.
            poll_s: Seconds between looks.

        Raises:
            JobFailedError: It failed; the message has the error and the last lines of the log.
            JobCanceledError: It was canceled.
            WaitTimeoutError: `timeout` passed first. The job goes on.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        if on_event is not None and not callable(on_event):
            raise InvalidInputError(f"on_event: {shown(on_event)} is no function")
        poll_s = check_seconds("poll_s", poll_s)
        self.record = wait_for(self._ow, self.id, timeout, on_event, poll_s)
        return self

    @overload
    def logs(self, follow: Literal[False] = False, run_id: int | None = None) -> str: ...
    @overload
    def logs(self, follow: Literal[True], run_id: int | None = None) -> Iterator[str]: ...
    def logs(self, follow: bool = False, run_id: int | None = None) -> str | Iterator[str]:
        """What the job has printed.

        Args:
            follow: Return an iterator that yields the text as it comes and ends with the job (or
                the run `run_id`). When the job gets a new run, the text of that run follows.
            run_id: One of its runs; default: the last one.

        Raises:
            NotFoundError: The job has no such run.
        """
        if run_id is not None and check_whole("run_id", run_id) not in {r.id for r in self.runs}:
            raise NotFoundError(f"job {self.id} has no run {run_id}; `job.runs` lists them")
        if follow:
            return follow_log(self._ow, self.id, run_id, POLL_S)
        if run_id is None:
            last = self._ow.runs.list(job_id=self.id, limit=1)
            if not last:
                return ""
            run_id = last[0].id
        return b"".join(read_log_chunks(self._ow.backend, run_id)).decode(errors="replace")

    def events(self, type: str | None = None) -> list[EventRecord]:
        """What its runs have logged, oldest first.

        Args:
            type: Only events of this type; `openweights.events` lists the types.
        """
        return self._ow.events.list(job_id=self.id, type=type)

    def metrics(self, as_dataframe: bool | None = None) -> Any:
        """A table of all that was measured: a row for each step and tag, a column for each measure.

        What a trainer logs has the tag "train", or "eval" for the test set. What was followed
        besides goes by `multiple_choice/accuracy`, `logprobs/loss` and so on, with the name of its
        set as the tag.

        Args:
            as_dataframe: True for a pandas DataFrame, False for a list of dicts; None for a
                DataFrame if pandas is installed.

        Raises:
            ConfigurationError: A DataFrame was asked for, and pandas is not installed.
        """
        rows = self.metric_rows()
        if as_dataframe is False:
            return rows
        from openweights.client.watching.plot import as_table

        return as_table(rows, required=bool(as_dataframe))

    def metric_rows(self) -> list[dict[str, Any]]:
        """`metrics` as a list of dicts."""
        return metric_rows(self._ow.events.iterate(job_id=self.id))

    def plot(self, path: str | Path | None = None) -> Figure:
        """A figure of what was measured against the step: a panel for each measure, train and eval
        together, a line for each tag. Timings, counts and what never changes are left to the table.
        Of a job of SDFT that has made no step, as one that its gate has stopped, bars of the gate.

        Args:
            path: Where to save it, too; the ending decides the format.

        Raises:
            ConfigurationError: matplotlib is not installed.
            InvalidInputError: The job has logged no metrics, or the ending is no format.
        """
        from openweights.client.watching.model_names import model_names
        from openweights.client.watching.panels import metric_panels, shares_loss
        from openweights.client.watching.plot import draw_gate, draw_panels, plot_title

        rows = self.metric_rows()
        if not rows:
            raise InvalidInputError(f"job {self.id} has logged no metrics to plot")
        target = None if path is None else as_path("path", path)
        names = model_names(self._ow.backend, [self.record.model or ""])
        title = plot_title([self.record], names)
        if bars := self._gate_bars(rows):
            return draw_gate(bars, title=title, path=target)
        panels = metric_panels(rows, shares_loss=shares_loss(self.record))
        return draw_panels(
            panels, title=title, path=target, has_one_legend=False, most=_MOST_PANELS
        )

    def _gate_bars(self, rows: Sequence[Row]) -> GateBars | None:
        """What its teacher gate found, where nothing was measured behind it."""
        from openweights.client.watching.panels import gate_bars, is_gate_alone

        if not is_gate_alone(rows):
            return None
        last = self.events(type=TeacherGate.type)[-1]
        return gate_bars(last.data, str(self.record.validated_params.get("sdft_gate")))

    def sample(
        self, prompts: Sequence[Prompt], *, base: bool = True, **params: Any
    ) -> list[Sample]:
        """What the trained model answers, and what the model said before.

        While the job trains, its newest checkpoint answers.

        Args:
            prompts: Questions, or conversations as lists of messages.
            base: Whether the model that it was trained from is asked, too.
            **params: What `ow.inference.create` takes: `max_tokens` (256 where it is left out),
                `temperature`, …

        Returns:
            Of each prompt `prompt`, `base` and `answer`.

        Raises:
            ConfigError: The job has saved nothing yet, or a parameter is wrong.
            JobFailedError: The model could not be asked; the message has the end of the log.
        """
        from openweights.client.serving.sampling import sample

        return sample(self._ow, self, prompts, base=base, params=params)

    def download(self, target_dir: str | Path, only_last_run: bool = True) -> list[Path]:
        """Write result files, at their paths, the log as `log.txt`, and the table of `metrics` as
        `metrics.jsonl` into `target_dir`; of equal paths the last one. Logs of attempts before the
        last are `log-attempt-1.txt` and so on.

        Returns:
            What was written, as paths below `target_dir` as it was given.

        Raises:
            InvalidInputError: A path leaves `target_dir`; nothing was written.
            InvalidStateError: It has not run yet.
        """
        target = as_path("target_dir", target_dir)
        runs = self._ow.runs.list(job_id=self.id, limit=1 if only_last_run else None)
        if not runs:
            raise InvalidStateError(
                f"job {self.id} has not run, so that it has no results; it is "
                f"{self.refresh().status.replace('_', ' ')}"
            )
        backend = self._ow.backend
        events = (event for run in runs for event in backend.list_events(run_id=run.id))
        files = write_results(backend, events, target)
        for run in runs:
            files += write_log(backend, run.record, target, files, is_last=run is runs[-1])
        table = target / "metrics.jsonl"
        is_written = table in files  # by the job itself
        if not is_written and (rows := self.metric_rows()):
            files.append(write_table(rows, table))
        return files


class JobCollection:
    """The organization's jobs, of every kind."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow

    def list(self, limit: int | None = 10, status: JobStatus | None = None) -> list[Job]:
        """The last changed first.

        Args:
            limit: None for all.
            status: Only those, as many as `limit` says.
        """
        if status is not None:
            check_known("status", status, JOB_STATUSES)
        statuses: list[JobStatus] | None = None if status is None else [status]
        found = self._ow.backend.list_jobs(statuses=statuses, limit=check_limit(limit))
        return [Job(self._ow, job) for job in found]

    def retrieve(self, job_id: str) -> Job:
        """The job of that id, or the only one whose id begins so.

        Raises:
            NotFoundError: No id begins so.
            InvalidInputError: Several do, or no id looks like this.
        """
        return Job(self._ow, find_job(self._ow.backend, job_id))

    def cancel(self, job_id: str) -> Job:
        """See `Job.cancel`."""
        return self.retrieve(job_id).cancel()

    def restart(self, job_id: str) -> Job:
        """See `Job.restart`."""
        return self.retrieve(job_id).restart()

    def delete(self, job_id: str) -> None:
        """See `Job.delete`."""
        self.retrieve(job_id).delete()

    def pause(self) -> QueueState:
        """From now on no worker gets a new job, and no pod is started; what runs goes on."""
        return self._ow.backend.set_paused(True)

    def resume(self) -> QueueState:
        """The queue goes on."""
        state = self._ow.backend.set_paused(False)
        self._ow.ensure_worker()
        return state

    def queue(self) -> QueueState:
        """Whether the queue is paused, and how long runs may take that do not say it."""
        return self._ow.backend.queue_state()

    def set_max_duration(self, seconds: float | None) -> QueueState:
        """How long a run may take whose job does not say it; None for no limit."""
        return self._ow.backend.set_max_duration(seconds)

    def find(self, *, label: str | None = None, **params: Any) -> list[Job]:
        """Jobs whose parameters have these values, and that label if one is given; of a dict such
        as `meta` it is enough to name some keys.

        `find(model="Qwen/Qwen3-4B", meta={"sweep": 3})`, `find(label="sweep")`. `cloud_type`, and
        whole `validated_params` or `mounted_files`, can be matched, too.
        """
        where: dict[str, Any] = {}
        validated: dict[str, Any] = {}
        for name, value in params.items():
            value = plain(value, name)
            if name in ("validated_params", "mounted_files", "cloud_type"):
                where[name] = value
            else:
                validated[name] = value
        if validated:
            where["validated_params"] = {**where.get("validated_params", {}), **validated}
        if label is not None:
            check_text("label", label, "give the label that the jobs share")
        found = self._ow.backend.list_jobs(where=where, limit=None)
        return [Job(self._ow, job) for job in found if label is None or job.label == label]


def find_job(backend: Backend, text: str) -> JobRecord:
    """The job of that id, or the only one whose id begins so.

    Raises:
        InvalidInputError: No id looks like this, or several jobs begin so.
        NotFoundError: No job begins so.
    """
    if not isinstance(cast("object", text), str) or not _JOB_ID.fullmatch(text):
        raise InvalidInputError(f"{shown(text)} is not a job id; {_other_id(text)}")
    try:
        return backend.get_job(text)
    except NotFoundError:
        jobs = backend.list_jobs(limit=None)
    found = [job for job in jobs if job.id.startswith(text)]
    if not found:
        near = _near_ids(text, [job.id for job in jobs])
        raise NotFoundError(f"no job {text:.80}; {near}`ow ls` lists them")
    if len(found) > 1:
        names = sorted(job.id for job in found)
        first = ", ".join(names[:_SHOWN] + ["…"] * (len(names) > _SHOWN))
        raise InvalidInputError(f"{text} begins {len(names)} job ids: {first}; type more of it")
    return found[0]


def _other_id(text: object) -> str:
    """What to do instead, with what is perhaps the id of something else."""
    if isinstance(text, Job):
        return "it is a job already; its `id` is one"
    if isinstance(text, str) and _FILE_ID.fullmatch(text):
        return f"it is that of a file: `ow fetch {text}`"
    return "`ow ls` lists them"


def _near_ids(text: str, ids: Sequence[str]) -> str:
    """Which ids were perhaps meant: those that hold what was typed, else those that are alike."""
    if len(text) > _LONGEST_TYPED:
        return ""
    parts = [part for part in (text, text.rpartition("-")[2]) if len(part) >= _LEAST_DIGITS]
    near = [id for id in ids if any(part in id for part in parts)]
    near = near or difflib.get_close_matches(text, ids, n=_SHOWN, cutoff=_ALIKE)
    if not near:
        starts = {id[: len(text)]: id for id in reversed(ids)}
        near = [starts[s] for s in difflib.get_close_matches(text, starts, n=1, cutoff=_ALIKE)]
    return f"did you mean {' or '.join(near[:_SHOWN])}? " if near else ""


def _is_field(name: object) -> bool:
    return isinstance(name, str) and name in JobRecord.__dataclass_fields__


def moment_after(backend: Backend, name: str, seconds: float | None) -> datetime | None:
    """The moment so many seconds from now, by the store's clock; None for none.

    Args:
        name: Of the argument that says how many, for the message.

    Raises:
        InvalidInputError: It is no number, or no clock will ever show the moment.
    """
    if seconds is None:
        return None
    try:
        return backend.now() + timedelta(seconds=seconds)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(
            f"{name}: {shown(seconds)} is no number of seconds from now"
        ) from None
