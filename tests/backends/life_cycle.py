"""A small model of the life of jobs, and a machine that compares a store with it step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openweights.backends.base import Backend
from openweights.errors import FencedError, InvalidInputError, InvalidStateError
from openweights.types import ENDED, Instruction, JobSpec, Retry, WorkerSpec

_MAX_LOST = 2
_counter = itertools.count()

# What each job asks for: `b` is tried again once and shares a label with `c`, of which one runs at
# a time; `c` is for later whenever it is submitted; `d` comes after `a`.
names = st.sampled_from(["a", "b", "c", "d"])
_LABELED = ("b", "c")
_RETRIES = {"b": 1}
_AFTER = {"d": "a"}
workers = st.sampled_from(["w1", "w2"])


@dataclass
class ModelRun:
    id: int
    job: ModelJob
    attempt: int
    worker: str
    leases_silent: int = 0
    status: str = "in_progress"
    lost_by_lease: bool = False
    is_released: bool = False


@dataclass
class ModelJob:
    id: str
    short: str
    status: str = "pending"
    lost: int = 0
    retries: int = 0
    silences_to_wait: int = 0
    failed_by: ModelJob | None = None
    runs: list[ModelRun] = field(default_factory=lambda: [])

    @property
    def open_run(self) -> ModelRun | None:
        return next((run for run in self.runs if run.status == "in_progress"), None)


class LifeCycle(RuleBasedStateMachine):
    """Random users and workers on one store; jobs and workers of each example have new names."""

    def __init__(self, backend: Backend, pass_time: Callable[[float], None]) -> None:
        super().__init__()
        self.backend = backend
        self.pass_time = pass_time
        self.prefix = f"example-{next(_counter)}-"
        self.jobs: dict[str, ModelJob] = {}
        self.workers: dict[str, str] = {}
        self.is_paused = False

    # ---- what the model knows

    def runs(self) -> list[ModelRun]:
        return [run for job in self.jobs.values() for run in job.runs]

    def held_by(self, worker: str) -> ModelRun | None:
        open_runs = (run for run in self.runs() if run.status == "in_progress")
        return next((run for run in open_runs if run.worker == worker), None)

    def lose(self, run: ModelRun, *, by_lease: bool) -> None:
        job = run.job
        if job.status == "canceled":
            run.status = "canceled"
            return
        run.status = "failed"
        job.lost += 1
        if job.lost >= _MAX_LOST:
            self.end(job, "failed")
        else:
            job.status = "pending"
        run.lost_by_lease = by_lease

    def end(self, job: ModelJob, status: str) -> None:
        """With those that wait for it, if that is not how they can begin."""
        job.status = status
        if status in ("failed", "canceled"):
            for other in self.jobs.values():
                if other.status == "pending" and _AFTER.get(other.short) == job.short:
                    other.status, other.failed_by = "failed", job

    def needed(self, short: str) -> ModelJob | None:
        return self.jobs.get(_AFTER.get(short, ""))

    def is_due(self, job: ModelJob) -> bool:
        needed = self.needed(job.short)
        running = [j.short for j in self.jobs.values() if j.status == "in_progress"]
        return (
            job.status == "pending"
            and not self.is_paused
            and not job.silences_to_wait
            and (needed is None or needed.status == "completed")
            and not (job.short in _LABELED and set(running) & set(_LABELED))
        )

    def name(self, short: str) -> str:
        return self.prefix + short

    # ---- users

    @rule(short=names)
    def submit(self, short: str) -> None:
        job, needed = self.jobs.get(short), self.needed(short)
        is_new_or_ended_badly = job is None or job.status in ("failed", "canceled")
        if short in _AFTER and needed is None:
            with pytest.raises(InvalidInputError, match="there is no job"):
                self.backend.submit_job(self.spec(short))
            return
        if needed is not None and is_new_or_ended_badly and needed.status in ("failed", "canceled"):
            with pytest.raises(InvalidStateError, match="restart it first"):
                self.backend.submit_job(self.spec(short))
            return
        stored = self.backend.submit_job(self.spec(short))
        job = self.jobs.setdefault(short, ModelJob(stored.id, short))
        if job.status in ("failed", "canceled"):
            self.revive(job)
        if job.status == "pending":
            job.silences_to_wait = int(short == "c")
        assert stored.status == job.status

    def spec(self, short: str) -> JobSpec:
        """Of `c` the moment lies between now and the next time when all fall silent."""
        later = self.backend.now() + timedelta(seconds=self.backend.lease_s)
        retries = _RETRIES.get(short)
        return JobSpec(
            self.name(short),
            "custom",
            "true",
            {},
            max_attempts=_MAX_LOST,
            after=(self.name(_AFTER[short]),) if short in _AFTER else (),
            not_before=later if short == "c" else None,
            label=self.name("label") if short in _LABELED else None,
            max_running=1 if short in _LABELED else None,
            retry=None if retries is None else Retry(retries, 0.0, ("any",)),
        )

    def revive(self, job: ModelJob) -> None:
        if job.open_run is not None:
            job.open_run.status = "canceled"
        job.status, job.lost, job.retries, job.failed_by = "pending", 0, 0, None
        for other in self.jobs.values():
            if other.failed_by is job:
                other.status, other.lost, other.failed_by = "pending", 0, None

    @rule(is_paused=st.booleans())
    def pause_or_resume(self, is_paused: bool) -> None:
        self.is_paused = is_paused
        assert (self.backend.set_paused(is_paused).paused_at is not None) == is_paused

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        if job.status in ("completed", "failed"):
            with pytest.raises(InvalidStateError):
                self.backend.cancel_job(job.id)
        else:
            assert self.backend.cancel_job(job.id).status == "canceled"
            self.end(job, "canceled")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        needed = self.needed(job.short)
        may_wait = needed is None or needed.status not in ("failed", "canceled")
        if job.status in ("failed", "canceled") and may_wait:
            self.revive(job)
            job.silences_to_wait = 0  # who restarts it wants it now
            assert self.backend.restart_job(job.id).status == "pending"
        else:
            with pytest.raises(InvalidStateError):
                self.backend.restart_job(job.id)

    # ---- workers

    @rule(short=workers)
    def register(self, short: str) -> None:
        held = self.held_by(short)
        if held is not None:
            self.lose(held, by_lease=False)
        self.workers[short] = "active"
        self.backend.register_worker(WorkerSpec(self.name(short)))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), status=st.sampled_from(["shutdown", "terminated"]))
    def end_worker(self, data: st.DataObject, status: Literal["shutdown", "terminated"]) -> None:
        short = data.draw(st.sampled_from(sorted(self.workers)))
        held = self.held_by(short)
        if status == "terminated" and held is not None:
            self.lose(held, by_lease=False)
        if self.workers[short] != "terminated":
            self.workers[short] = status
        stored = self.backend.set_worker_status(self.name(short), status)
        assert stored.status == self.workers[short]

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        short = data.draw(st.sampled_from(sorted(self.workers)))
        got = self.backend.claim_job(self.name(short))
        for run in self.runs():
            is_silent = run.status == "in_progress" and run.leases_silent > 0
            if is_silent and run.worker != short:
                self.lose(run, by_lease=True)
        held = self.held_by(short)
        if held is not None and held.job.status == "canceled":
            held.status, held = "canceled", None
        pending = [job for job in self.jobs.values() if self.is_due(job)]
        if held is not None:
            held.leases_silent = 0
            assert got is not None and got.run.id == held.id
        elif self.workers[short] != "active" or not pending:
            assert got is None
        else:
            # Submitted in this order; a job that comes back keeps its place.
            assert got is not None and got.job.id == pending[0].id
            job = pending[0]
            run = ModelRun(got.run.id, job, len(job.runs) + 1, short)
            assert got.run.attempt == run.attempt
            job.runs.append(run)
            job.status = "in_progress"

    @precondition(lambda self: self.runs() and self.workers)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs()))
        short = data.draw(st.sampled_from(sorted({run.worker, *self.workers})))
        got = self.backend.heartbeat(self.name(short), run.id)
        assert got == self.expected_instruction(run, short)

    def expected_instruction(self, run: ModelRun, short: str) -> Instruction:
        job = run.job
        if short != run.worker or run is not job.runs[-1]:
            return "fenced"
        can_win = job.status == "pending" and self.workers[short] != "terminated"
        if run.lost_by_lease and can_win and self.held_by(short) is None:
            run.status, job.status, run.lost_by_lease = "in_progress", "in_progress", False
            job.lost -= 1
        if run.status != "in_progress":
            return "fenced"
        run.leases_silent = 0
        if job.status == "canceled":
            return "cancel"
        return "continue" if self.workers[short] == "active" else "shutdown"

    @precondition(lambda self: self.runs())
    @rule(data=st.data(), status=st.sampled_from(["completed", "failed", "canceled"]))
    def finish(self, data: st.DataObject, status: Any) -> None:
        run = data.draw(st.sampled_from(self.runs()))
        job = run.job
        final = "canceled" if job.status == "canceled" else status
        was_retried = final == "failed" and job.status == "pending" and job.retries > 0
        is_repeated = run.status == final and (job.status == final or was_retried)
        if run is not job.runs[-1] or (run.status != "in_progress" and not is_repeated):
            with pytest.raises(FencedError):
                self.backend.finish_run(run.id, run.attempt, status, exit_code=1)
            return
        if run.status == "in_progress":
            run.status = final
            if final == "failed" and job.retries < _RETRIES.get(job.short, 0):
                job.retries += 1
                job.status = "pending"
            else:
                self.end(job, final)
        stored = self.backend.finish_run(run.id, run.attempt, status, exit_code=1)
        assert (stored.status, stored.retries) == (job.status, job.retries)

    @precondition(lambda self: self.runs())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.runs()))
        job = run.job
        is_open = run.status == "in_progress"
        if run is not job.runs[-1] or not (is_open or run.is_released):
            with pytest.raises(FencedError):
                self.backend.release_run(run.id, run.attempt, reason="test")
            return
        if is_open:
            run.is_released = True
            run.status = "canceled" if job.status == "canceled" else "failed"
            job.status = "canceled" if job.status == "canceled" else "pending"
        stored = self.backend.release_run(run.id, run.attempt, reason="test")
        assert stored.status == job.status

    @rule()
    def fall_silent(self) -> None:
        self.pass_time(self.backend.lease_s * 1.5)
        for run in self.runs():
            run.leases_silent += 1
        for job in self.jobs.values():
            job.silences_to_wait = 0

    # ---- what must hold after every step

    @invariant()
    def store_equals_model(self) -> None:
        for job in self.jobs.values():
            stored = self.backend.get_job(job.id)
            held = job.open_run
            worker = held.worker if held is not None and job.status == "in_progress" else None
            assert (stored.status, stored.attempts) == (job.status, len(job.runs))
            assert stored.worker_id == (None if worker is None else self.name(worker))
            assert stored.failed_by == (job.failed_by.id if job.failed_by else None)
            found = [(run.id, run.status) for run in self.backend.list_runs(job_id=job.id)]
            assert found == [(run.id, run.status) for run in job.runs]
            assert (job.status == "in_progress") <= (held is not None)

    def teardown(self) -> None:
        """Leave nothing that the next example could claim, or could not."""
        self.backend.set_paused(False)
        for job in reversed(self.jobs.values()):  # what waits for another one first
            if job.status not in ENDED:
                self.backend.cancel_job(job.id)
        for short in self.workers:
            self.backend.set_worker_status(self.name(short), "terminated")
