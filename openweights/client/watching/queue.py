"""What a pending job waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from openweights.client.watching.progress import duration, read_progress
from openweights.types import (
    ANSWERING_PREFIX,
    SERVED,
    SERVING_PREFIX,
    Ahead,
    JobRecord,
    JobStatus,
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


def place_in_queue(backend: Backend, job: JobRecord, *, is_remote: bool) -> tuple[int, str]:
    """How many jobs workers take before a pending one, and in a few words what it waits for."""
    place = backend.place_in_queue(job)
    if place.needed:
        return 0, waits_for_jobs(place.needed)
    if reason := held_back(job, place.like_it, backend.queue_state(), backend.now()):
        return 0, reason
    if is_remote:
        return place.ahead.total, waits_in_project(job, place.ahead)
    machine = Machine.read(backend)
    return place.ahead.total, machine.waits(job, place.ahead)


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs on this machine.

    Attributes:
        left_s: What the running job still takes, where that is known.
        there_gb: See `gpu_gb`.
        free: Lanes with a worker that holds no job.
    """

    running: Sequence[JobRecord] = ()
    left_s: float | None = None
    there_gb: int = 0
    free: frozenset[Lane] = frozenset()

    @classmethod
    def read(cls, backend: Backend) -> Machine:
        """Ask the store."""
        running = backend.list_jobs(statuses=("in_progress",), limit=None)
        left_s = next((read_progress(backend, other).left_s() for other in _busy(running)), None)
        workers = backend.list_workers(statuses=("active",))
        return cls(running, left_s, gpu_gb(workers), free_lanes(workers, running))

    def waits(self, job: JobRecord, ahead: Ahead) -> str:
        """See `waits_on_this_machine`."""
        running = [other for other in self.running if other.id != job.id]
        return waits_on_this_machine(job, running, ahead, self.left_s, self.there_gb, self.free)


@dataclass(frozen=True, slots=True)
class QueueView:
    """The queue as it was at a moment, read once for any number of waiting jobs.

    Attributes:
        machine: This one; None for a project.
    """

    running: Sequence[JobRecord]
    pending: Sequence[JobRecord]
    state: QueueState
    now: datetime
    machine: Machine | None = None

    @classmethod
    def read(
        cls, backend: Backend, *, is_remote: bool, pending: Sequence[JobRecord] | None = None
    ) -> QueueView:
        """Ask the store.

        Args:
            pending: All of them, if they are known.
        """
        machine = None if is_remote else Machine.read(backend)
        in_progress = ("in_progress",)
        running = (
            machine.running if machine else backend.list_jobs(statuses=in_progress, limit=None)
        )
        if pending is None:
            pending = backend.list_jobs(statuses=("pending",), limit=None)
        return cls(running, pending, backend.queue_state(), backend.now(), machine)

    def first_reasons(self, most: int) -> dict[str, str]:
        """As `reasons`, of the first `most` pending jobs in the order in which they are taken."""
        return self.reasons(job.id for job in in_order(self.pending)[:most])

    def reasons(self, asked: Iterable[str]) -> dict[str, str]:
        """What each of these pending jobs waits for, by id; as `waits_for` says it, in one pass
        over the queue however many are asked for.
        """
        unfinished = {job.id: job for job in (*self.pending, *self.running)}
        labels = Counter(job.label for job in self.running)
        wanted, reasons = set(asked), dict[str, str]()
        ahead = Ahead()
        for job in in_order(self.pending):
            if len(reasons) == len(wanted):
                break
            reason = ""
            if needed := [unfinished[id] for id in job.after if id in unfinished]:
                reason = waits_for_jobs([(other.id, other.status) for other in needed])
            elif not (reason := held_back(job, labels[job.label], self.state, self.now)):
                if job.id in wanted:
                    reason = self._behind(job, ahead)
                ahead = ahead.then(job)
            if job.id in wanted:
                reasons[job.id] = reason
        return reasons

    def _behind(self, job: JobRecord, ahead: Ahead) -> str:
        """What a job waits for that may be taken once those before it are."""
        return (
            waits_in_project(job, ahead) if self.machine is None else self.machine.waits(job, ahead)
        )


def in_order(pending: Iterable[JobRecord]) -> list[JobRecord]:
    """As workers take them, the next one first."""
    return sorted(pending, key=_rank)


def _rank(job: JobRecord) -> tuple[int, object, str]:
    """Workers take the least one first."""
    return -job.priority, job.created_at, job.id


def held_back(job: JobRecord, like_it: int, state: QueueState, now: datetime) -> str:
    """Why no worker may take a job now that waits for no other; empty when one may.

    Args:
        like_it: Other jobs that run with its label.
    """
    if state.paused_at is not None:
        return "for the queue, which is paused: `ow resume`"
    if job.not_before is not None and job.not_before > now:
        why = f"after failure {job.retries}, " if job.retries else ""
        return f"{why}until {job.not_before.astimezone():%Y-%m-%d %H:%M:%S}"
    if job.max_running is not None and like_it >= job.max_running:
        return f"for one of {like_it} jobs with the label {job.label} to end"
    return ""


def waits_for_jobs(needed: Sequence[tuple[str, JobStatus]]) -> str:
    """Those that must complete first, with their status."""
    first, status = needed[0]
    more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
    return f"for {first} ({status.replace('_', ' ')}){more}"


def waits_on_this_machine(
    job: JobRecord,
    running: Sequence[JobRecord],
    before: Ahead,
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
    first, count = before.first, before.ending
    if job.is_question and is_answered_beside(job.requires_vram_gb, running, there_gb):
        busy = [other for other in busy if other.is_question]
        first, count = before.first_question, before.questions
        lane = "questions"
    first, count = busy[0].id if busy else first, len(busy) + count
    if not count or job.type == SERVED:
        return f"for its worker, which {'takes it now' if lane in free else 'is starting'}"
    more = f" and {count - 1} more" if count > 1 else ""
    time = f" ({duration(left_s)} left)" if busy and left_s is not None else ""
    needs = sum(map(_gb, running)) + job.requires_vram_gb
    why = (
        f": together they need {needs} GB of a GPU with {there_gb}" if 0 < there_gb < needs else ""
    )
    return f"behind {first}{time}{more}{why if job.is_question else ''}"


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


def is_answered_beside(needs_gb: int, running: Sequence[JobRecord], there_gb: int) -> bool:
    """Whether a question that needs so much memory can be answered beside a job which runs, so
    that it does not wait for its end: all that runs on a GPU has to have asked for no more memory,
    together with it, than one GPU has. Without a GPU the question waits for memory by itself.
    """
    if all(other.is_question for other in _busy(running)):
        return False
    return there_gb == 0 or needs_gb + sum(map(_gb, running)) <= there_gb


def is_first_answered_beside(ahead: Ahead, running: Sequence[JobRecord], there_gb: int) -> bool:
    """The same of the first question that waits, if one does."""
    return ahead.questions > 0 and is_answered_beside(ahead.question_gb, running, there_gb)


def is_answered_apart(job: JobRecord) -> bool:
    """Whether it runs in the lane for questions of this machine."""
    return (job.worker_id or "").startswith(ANSWERING_PREFIX)


def gpu_gb(workers: Iterable[WorkerRecord]) -> int:
    """Memory of one GPU of this machine, in GiB, as its workers have found it; 0 without one."""
    return min((w.vram_gb // w.gpu_count for w in workers if w.gpu_count), default=0)


def _gb(job: JobRecord) -> int:
    return 0 if job.type == "script" else job.requires_vram_gb


def waits_in_project(job: JobRecord, before: Ahead) -> str:
    """A project's workers are of many kinds: the job needs one that fits."""
    if job.allowed_hardware:
        needs = f"for {' or '.join(job.allowed_hardware)}"
    elif job.requires_vram_gb:
        needs = f"for a worker with {job.requires_vram_gb} GB of GPU memory"
    else:
        needs = "for a worker"
    cloud = job.params.get("cloud_type")
    tier = f" ({cloud})" if cloud else ""
    ahead = f", {before.total} before it" if before.total else ""
    return f"{needs}{tier}{ahead}"
