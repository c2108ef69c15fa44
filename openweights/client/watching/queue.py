"""What a pending job waits for."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from openweights.client.watching.progress import duration, read_progress
from openweights.types import (
    ANSWERING_PREFIX,
    SERVED,
    SERVING_PREFIX,
    JobRecord,
    Lane,
    QueueState,
    WorkerRecord,
)

if TYPE_CHECKING:
    from openweights.backends.base import Backend


def waits_for(backend: Backend, job: JobRecord, *, is_remote: bool) -> str:
    """In a few words; empty for a job that does not wait."""
    if job.status != "pending":
        return ""
    return place_in_queue(backend, job, is_remote=is_remote)[1]


def place_in_queue(
    backend: Backend, job: JobRecord, *, is_remote: bool
) -> tuple[list[JobRecord], str]:
    """The jobs that workers take before a pending one, and in a few words what it waits for."""
    return QueueView.read(backend, is_remote=is_remote).place(job)


@dataclass(frozen=True, slots=True)
class QueueView:
    """The queue as it was at a moment, read once for any number of waiting jobs.

    Attributes:
        left_s: What the running job on this machine still takes, where that is known.
        there_gb: See `gpu_gb`.
        free: Lanes of this machine with a worker that holds no job.
    """

    running: Sequence[JobRecord]
    pending: Sequence[JobRecord]
    state: QueueState
    now: datetime
    is_remote: bool
    left_s: float | None = None
    there_gb: int = 0
    free: frozenset[Lane] = frozenset()

    @classmethod
    def read(
        cls, backend: Backend, *, is_remote: bool, pending: Sequence[JobRecord] | None = None
    ) -> QueueView:
        """Ask the store.

        Args:
            pending: All of them, if they are known.
        """
        running = backend.list_jobs(statuses=("in_progress",), limit=None)
        if pending is None:
            pending = backend.list_jobs(statuses=("pending",), limit=None)
        view = cls(running, pending, backend.queue_state(), backend.now(), is_remote)
        if is_remote:
            return view
        left_s = next((read_progress(backend, other).left_s() for other in _busy(running)), None)
        workers = backend.list_workers(statuses=("active",))
        free = free_lanes(workers, running)
        return replace(view, left_s=left_s, there_gb=gpu_gb(workers), free=free)

    def place(self, job: JobRecord) -> tuple[list[JobRecord], str]:
        """As `place_in_queue`."""
        running = [other for other in self.running if other.id != job.id]
        # With the job itself: what waits for it is not before it, whatever its priority.
        unfinished = {other.id: other for other in (*self.pending, *running, job)}
        if needed := [unfinished[id] for id in job.after if id in unfinished and id != job.id]:
            return [], waits_for_jobs(needed)
        if reason := held_back(job, running, self.state, self.now):
            return [], reason
        before = [
            other
            for other in self.pending
            if other.id != job.id
            and _rank(other) < _rank(job)
            and unfinished.keys().isdisjoint(other.after)
            and not held_back(other, running, self.state, self.now)
        ]
        before = in_order(before)
        return before, self._behind(job, running, before)

    def first_reasons(self, most: int) -> dict[str, str]:
        """As `reasons`, of the first `most` pending jobs in the order in which they are taken."""
        return self.reasons(job.id for job in in_order(self.pending)[:most])

    def reasons(self, asked: Iterable[str]) -> dict[str, str]:
        """What each of these pending jobs waits for, by id; as `place` says it, in one pass over
        the queue however many are asked for.
        """
        unfinished = {job.id: job for job in (*self.pending, *self.running)}
        wanted, reasons = set(asked), dict[str, str]()
        before: list[JobRecord] = []
        for job in in_order(self.pending):
            if len(reasons) == len(wanted):
                break
            reason = ""
            if needed := [unfinished[id] for id in job.after if id in unfinished]:
                reason = waits_for_jobs(needed)
            elif not (reason := held_back(job, self.running, self.state, self.now)):
                if job.id in wanted:
                    reason = self._behind(job, self.running, before)
                before.append(job)
            if job.id in wanted:
                reasons[job.id] = reason
        return reasons

    def _behind(
        self, job: JobRecord, running: Sequence[JobRecord], before: Sequence[JobRecord]
    ) -> str:
        """What a job waits for that may be taken once those before it are."""
        if self.is_remote:
            return waits_in_project(job, before)
        return waits_on_this_machine(job, running, before, self.left_s, self.there_gb, self.free)


def in_order(pending: Iterable[JobRecord]) -> list[JobRecord]:
    """As workers take them, the next one first."""
    return sorted(pending, key=_rank)


def _rank(job: JobRecord) -> tuple[int, object, str]:
    """Workers take the least one first."""
    return -job.priority, job.created_at, job.id


def held_back(
    job: JobRecord, running: Sequence[JobRecord], state: QueueState, now: datetime
) -> str:
    """Why no worker may take a job now that waits for no other; empty when one may."""
    if state.paused_at is not None:
        return "for the queue, which is paused: `ow resume`"
    if job.not_before is not None and job.not_before > now:
        why = f"after failure {job.retries}, " if job.retries else ""
        return f"{why}until {job.not_before.astimezone():%Y-%m-%d %H:%M:%S}"
    like_it = [other.id for other in running if other.label == job.label]
    if job.max_running is not None and len(like_it) >= job.max_running:
        return f"for one of {len(like_it)} jobs with the label {job.label} to end"
    return ""


# Of a long queue so many are read at each look, and all of them every so often.
_NEWEST = 200
_ALL_EVERY_S = 10.0


class DueJobs:
    """Looks for due jobs again and again: of a long queue at those that were queued last, and only
    now and then at all of it, so that to fill it does not take longer the fuller it is.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._read_all_at = -_ALL_EVERY_S

    def __call__(self) -> list[JobRecord]:
        """Some of `due_jobs`; those that were queued since the last call among them, but for those
        that come after others.
        """
        newest = self._backend.list_jobs(statuses=("pending",), limit=_NEWEST)
        if len(newest) < _NEWEST:
            return _due(self._backend, newest)
        if time.monotonic() >= self._read_all_at + _ALL_EVERY_S:
            self._read_all_at = time.monotonic()
            return due_jobs(self._backend)
        # Whether what a job comes after has ended is not known from these alone.
        return _due(self._backend, [job for job in newest if not job.after])


def due_jobs(backend: Backend) -> list[JobRecord]:
    """The pending jobs that some worker could take now."""
    return _due(backend, backend.list_jobs(statuses=("pending",), limit=None))


def _due(backend: Backend, pending: Sequence[JobRecord]) -> list[JobRecord]:
    if not pending:
        return []
    running = backend.list_jobs(statuses=("in_progress",), limit=None)
    state, now = backend.queue_state(), backend.now()
    unfinished = {job.id for job in (*pending, *running)}
    return [
        job
        for job in pending
        if unfinished.isdisjoint(job.after) and not held_back(job, running, state, now)
    ]


def waits_for_jobs(needed: Sequence[JobRecord]) -> str:
    """Those that must complete first."""
    first = needed[0]
    more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
    return f"for {first.id} ({first.status.replace('_', ' ')}){more}"


def waits_on_this_machine(
    job: JobRecord,
    running: Sequence[JobRecord],
    before: Sequence[JobRecord],
    left_s: float | None = None,
    there_gb: int = 0,
    free: Container[Lane] = (),
) -> str:
    """Its worker takes one job after the other, whatever they ask for. A script needs none, a model
    that is served has one of its own, and so have questions that have room beside what runs.

    Args:
        left_s: What the running job still takes, where that is known.
        there_gb: See `gpu_gb`.
        free: Lanes with a worker that holds no job.
    """
    lane: Lane = "servers" if job.type == SERVED else "jobs"
    busy = _busy(running)
    if job.is_question and is_answered_beside([job], running, there_gb):
        busy = [other for other in busy if other.is_question]
        before = [other for other in before if other.is_question]
        lane = "questions"
    ahead = [*busy, *(other for other in before if other.type != SERVED)]
    if not ahead or job.type == SERVED:
        return f"for its worker, which {'takes it now' if lane in free else 'is starting'}"
    more = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
    time = f" ({duration(left_s)} left)" if busy and left_s is not None else ""
    needs = sum(map(_gb, running)) + job.requires_vram_gb
    why = (
        f": together they need {needs} GB of a GPU with {there_gb}" if 0 < there_gb < needs else ""
    )
    return f"behind {ahead[0].id}{time}{more}{why if job.is_question else ''}"


def free_lanes(workers: Iterable[WorkerRecord], running: Iterable[JobRecord]) -> frozenset[Lane]:
    """Those with a worker that holds none of the running jobs."""
    held = {job.worker_id for job in running}
    return frozenset(_lane_of(worker.id) for worker in workers if worker.id not in held)


def _lane_of(worker_id: str) -> Lane:
    if worker_id.startswith(SERVING_PREFIX):
        return "servers"
    return "questions" if worker_id.startswith(ANSWERING_PREFIX) else "jobs"


def _busy(running: Sequence[JobRecord]) -> list[JobRecord]:
    """What holds the worker for jobs, or that for questions."""
    return [other for other in running if other.type not in ("script", SERVED)]


def is_answered_beside(
    due: Sequence[JobRecord], running: Sequence[JobRecord], there_gb: int
) -> bool:
    """Whether one of the due jobs is a question that can be answered beside a job which runs, so
    that it does not wait for its end: all that runs on a GPU has to have asked for no more memory,
    together with it, than one GPU has. Without a GPU the question waits for memory by itself.
    """
    questions = [job for job in due if job.is_question]
    if not questions or all(other.is_question for other in _busy(running)):
        return False
    return there_gb == 0 or questions[0].requires_vram_gb + sum(map(_gb, running)) <= there_gb


def is_answered_apart(job: JobRecord) -> bool:
    """Whether it runs in the lane for questions of this machine."""
    return (job.worker_id or "").startswith(ANSWERING_PREFIX)


def gpu_gb(workers: Iterable[WorkerRecord]) -> int:
    """Memory of one GPU of this machine, in GiB, as its workers have found it; 0 without one."""
    return min((w.vram_gb // w.gpu_count for w in workers if w.gpu_count), default=0)


def _gb(job: JobRecord) -> int:
    return 0 if job.type == "script" else job.requires_vram_gb


def waits_in_project(job: JobRecord, before: Sequence[JobRecord]) -> str:
    """A project's workers are of many kinds: the job needs one that fits."""
    if job.allowed_hardware:
        needs = f"for {' or '.join(job.allowed_hardware)}"
    elif job.requires_vram_gb:
        needs = f"for a worker with {job.requires_vram_gb} GB of GPU memory"
    else:
        needs = "for a worker"
    cloud = job.params.get("cloud_type")
    tier = f" ({cloud})" if cloud else ""
    ahead = f", {len(before)} before it" if before else ""
    return f"{needs}{tier}{ahead}"
