"""Watching a job from outside: waiting for its end and following its log, by looking at the store
again and again.
"""

from __future__ import annotations

import codecs
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from openweights.client.results import read_log_chunks
from openweights.client.watching.attempts import begins_again, last_checkpoint
from openweights.client.watching.estimates import Estimate
from openweights.client.watching.notes import tell_last
from openweights.client.watching.progress import (
    Display,
    Progress,
    open_display,
    read_progress,
)
from openweights.client.watching.queue import QueueView, waits_for
from openweights.errors import (
    JobCanceledError,
    JobFailedError,
    StoreUnavailableError,
    WaitTimeoutError,
)
from openweights.retry import no_later_than, retry
from openweights.types import ENDED, EventRecord, JobRecord, RunRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.client import OpenWeights

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_TAIL_LINES = 20
# How a worker ends the log of a failed run, and how the reason of one begins that gave its own.
_WORKER_SAYS = "[openweights] failed: "
_EXIT = re.compile(r"(?:exit code -?\d+|killed by signal \d+)(?: \([^)]*\))?(?:: |$)")
_TAIL_BYTES = 1 << 14
# After so long without a run, somebody who looks is told what the job waits for.
_SILENT_S = 15.0
# A store that is away for longer is not worth waiting for.
_PATIENCE_S = 300.0
_LONGEST_PAUSE_S = 10.0
_QUEUE_EVERY_S = 5.0


def wait_for(
    ow: OpenWeights,
    job_id: str,
    timeout: float | None,
    on_event: Callable[[EventRecord], None] | None,
    poll_s: float,
) -> JobRecord:
    """The job once it has completed; `Job.wait` says more."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with no_later_than(deadline), open_display(job_id) as display:
            job = _watch(ow, job_id, deadline, on_event, poll_s, display)
    except KeyboardInterrupt as error:
        tell_last(logger, error, f"job {job_id} goes on; `ow cancel {job_id}` stops it")
        raise
    except StoreUnavailableError as error:
        if deadline is None or time.monotonic() < deadline:
            raise
        raise WaitTimeoutError(
            f"the store is away, so nobody knows of {job_id}: {error}"
        ) from error
    if job.status != "completed":
        raise failure(ow, job)
    return job


def _watch(
    ow: OpenWeights,
    job_id: str,
    deadline: float | None,
    on_event: Callable[[EventRecord], None] | None,
    poll_s: float,
    display: Display,
) -> JobRecord:
    """Look until the job has ended."""
    last_event, progress = 0, Progress()
    queue, again, look_at, seen, is_told = "", "", 0.0, ("", 0), False
    while True:
        # Read before the events: those of a job that has ended are then complete.
        job = patiently(lambda: ow.backend.get_job(job_id))
        if seen != (job.status, job.attempts):
            seen, look_at, is_told = (job.status, job.attempts), 0.0, False
            progress = _of_last_run(ow, job_id, progress)
            again = patiently(lambda: begins_again(ow.backend, job))  # noqa: B023
        for event in _new_events(ow, job_id, last_event):
            last_event = event.id
            progress = progress.after(event)
            if on_event is not None:
                on_event(event)
        if job.status == "pending" and time.monotonic() >= look_at:
            queue, look_at = _waits_for(ow, job), time.monotonic() + _QUEUE_EVERY_S
        now = progress.of(job)
        display.show(job, now, "" if is_told else note_on(job, now, queue, again))
        # Why it begins again is told with the first word of what it does, not with each.
        is_told = bool(again and now.words())
        if job.status in ENDED:
            return job
        _sleep(poll_s, deadline, job)
        ow.ensure_worker()


def _of_last_run(ow: OpenWeights, job_id: str, progress: Progress) -> Progress:
    """What a run before has reached says nothing of the last one."""
    runs = patiently(lambda: ow.backend.list_runs(job_id=job_id, limit=1))
    is_of_another = bool(runs) and runs[-1].id != progress.run_id
    return Progress(runs[-1].id) if is_of_another else progress


def note_on(job: JobRecord, progress: Progress, queue: str, again: str = "") -> str:
    """What a pending job waits for; and until its steps tell, why it begins again if it does, or
    how long all of it may take.
    """
    if job.status in ENDED:
        return ""
    notes = [queue if job.status == "pending" else ""]
    if not progress.seconds_per_step:
        expected = Estimate.of(job.params)
        notes.append(again or (expected.time_words() if expected else ""))
    return " · ".join(filter(None, notes))


def state_of(
    backend: Backend,
    job: JobRecord,
    progress: Progress | None = None,
    *,
    is_remote: bool,
    queue: str | None = None,
) -> str:
    """How far a job has come, or what a pending one waits for; and of one that begins again why.

    Args:
        progress: As `read_progress` has it; None to read it here.
        queue: As `waits_for` has it; None to read it here.
    """
    progress = progress or read_progress(backend, job)
    if queue is None:
        queue = waits_for(backend, job, is_remote=is_remote)
    again = "" if progress.seconds_per_step else begins_again(backend, job)
    return " · ".join(filter(None, (queue, again, progress.words())))


def states_of(backend: Backend, jobs: Iterable[JobRecord], *, is_remote: bool) -> dict[str, str]:
    """`state_of` of each that has not ended, by id; the queue is read once for all."""
    going = [job for job in jobs if job.status not in ENDED]
    reasons: dict[str, str] = {}
    if pending := [job.id for job in going if job.status == "pending"]:
        reasons = QueueView.read(backend, is_remote=is_remote).reasons(pending)
    return {
        job.id: state_of(backend, job, is_remote=is_remote, queue=reasons.get(job.id, ""))
        for job in going
    }


def follow_log(
    ow: OpenWeights, job_id: str, run_id: int | None, poll_s: float, *, skipped: int = 0
) -> Iterator[str]:
    """The text as it comes; `Job.logs` says more.

    Args:
        skipped: So many bytes of the first log are left out.
    """
    if run_id is not None:
        yield from _follow_run(ow, job_id, run_id, poll_s, skipped)
        return
    seen = _runs_to_skip(ow, job_id)
    tell_at = time.monotonic() + _SILENT_S
    while True:
        # Read before the runs: a job that has ended gets no more of them.
        job = patiently(lambda: ow.backend.get_job(job_id))
        newer = [run.id for run in _runs(ow, job_id) if run.id > seen]
        if newer:
            yield from _follow_run(ow, job_id, newer[0], poll_s, skipped)
            seen, skipped = newer[0], 0
        elif job.status in ENDED:
            return
        else:
            if time.monotonic() > tell_at:
                tell_at = float("inf")
                logger.warning("job %s waits %s", job.id, _waits_for(ow, job))
            time.sleep(poll_s)
            ow.ensure_worker()


def _waits_for(ow: OpenWeights, job: JobRecord) -> str:
    return patiently(lambda: waits_for(ow.backend, job, is_remote=ow.settings.is_remote))


def _follow_run(
    ow: OpenWeights, job_id: str, run_id: int, poll_s: float, offset: int
) -> Iterator[str]:
    """The log of one run from `offset` on, until it has ended."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    give_up_at: float | None = None
    while True:
        # Read before the log: that of a run that has ended is then complete.
        run = patiently(lambda: ow.backend.get_run(run_id))
        while chunk := patiently(lambda: ow.backend.read_log(run_id, offset)):  # noqa: B023
            offset += len(chunk)
            if text := decoder.decode(chunk):
                yield text
        if run.status != "in_progress" or (give_up_at and time.monotonic() > give_up_at):
            break
        if give_up_at is None and patiently(lambda: ow.backend.get_job(job_id)).status in ENDED:
            # A canceled job's worker stops it and says so; if the worker is gone, nobody does.
            give_up_at = time.monotonic() + ow.settings.cancel_grace_s + _LONGEST_PAUSE_S
        time.sleep(poll_s)
        ow.ensure_worker()
    if text := decoder.decode(b"", final=True):
        yield text


def patiently(call: Callable[[], _Result]) -> _Result:
    """`call()`, again and again while the store is away, for some minutes.

    Raises:
        StoreUnavailableError: It stayed away.
    """
    return retry(
        call,
        StoreUnavailableError,
        patience_s=_PATIENCE_S,
        on_error=lambda error, _: logger.warning("the store is away, trying again: %s", error),
    )


def _new_events(ow: OpenWeights, job_id: str, after: int) -> list[EventRecord]:
    return patiently(lambda: list(ow.backend.list_events(job_id=job_id, after=after)))


def _runs(ow: OpenWeights, job_id: str) -> list[RunRecord]:
    return patiently(lambda: ow.backend.list_runs(job_id=job_id))


def _runs_to_skip(ow: OpenWeights, job_id: str) -> int:
    """Id of the last run whose log is old: all but the last one; all of a job that waits to be run
    again.
    """
    runs = _runs(ow, job_id)
    job = patiently(lambda: ow.backend.get_job(job_id))
    old = runs if job.status == "pending" else runs[:-1]
    return old[-1].id if old else 0


def _sleep(poll_s: float, deadline: float | None, job: JobRecord) -> None:
    if deadline is None:
        time.sleep(poll_s)
        return
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise WaitTimeoutError(
            f"job {job.id} is still {job.status.replace('_', ' ')}; it goes on, wait again for more"
        )
    time.sleep(min(poll_s, left_s))


def why_failed(job: JobRecord, last_run: str | None) -> str | None:
    """Why a job has failed, in a line; None if it has not.

    Args:
        last_run: What its last run has failed of, if there was one. A job that fails because of
            another one has not failed of that.
    """
    if job.status != "failed":
        return None
    of_the_job = (job.outputs or {}).get("error")
    found = of_the_job if job.failed_by is not None else last_run or of_the_job
    return None if found is None else str(found)


def failure(ow: OpenWeights, job: JobRecord) -> JobFailedError:
    if job.status == "canceled":
        return JobCanceledError(f"job {job.id} was canceled; job.restart() queues it again")
    runs = _runs(ow, job.id)
    if job.failed_by is not None or not runs:
        reason = why_failed(job, None) or "before it ran"
        return JobFailedError(f"job {job.id} failed: {reason}")
    run = runs[-1]
    times = f" after {len(runs)} attempts" if len(runs) > 1 else ""
    message = f"job {job.id} failed{times}: {run.error or 'no reason was given'}"
    if step := last_checkpoint(ow.backend, job.id):
        message += f"\n`ow restart {job.id}` goes on from its checkpoint of step {step}"
    tail = "\n".join(f"    {line}" for line in _unsaid(_log_tail(ow, run), run.error or ""))
    return JobFailedError(f"{message}\nlast lines of its log:\n{tail}" if tail else message)


def _unsaid(lines: list[str], reason: str) -> list[str]:
    """The last lines of a log without those at its end that say the reason once more."""
    said = _EXIT.sub("", reason).removesuffix("…")
    end = len(lines)
    while end and (lines[end - 1].startswith(_WORKER_SAYS) or (said and said in lines[end - 1])):
        end -= 1
    return lines[:end][-_TAIL_LINES:]


def _log_tail(ow: OpenWeights, run: RunRecord) -> list[str]:
    start = max(0, run.log_bytes - _TAIL_BYTES)
    chunks = patiently(lambda: list(read_log_chunks(ow.backend, run.id, start)))
    text = b"".join(chunks).decode(errors="replace")
    return text.rstrip().splitlines()
