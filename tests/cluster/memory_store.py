"""A store in memory, as far as the manager and its workers use one, and faults for its calls."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from openweights.errors import InvalidStateError, StoreUnavailableError
from openweights.types import (
    Garbage,
    JobRecord,
    KeyRecord,
    NewKey,
    PendingRow,
    RunRecord,
    WorkerRow,
    WorkerSpec,
    WorkerStatus,
)


class Crash(BaseException):
    """The manager's process ends in the middle of whatever it does."""


@dataclass
class Faults:
    """Decides, call by call, what goes wrong."""

    random: random.Random
    share: float = 0.0

    def happens(self, weight: float = 1.0) -> bool:
        return self.share > 0 and self.random.random() < self.share * weight

    def around(self, call: Callable[[], Any], error: Callable[[], BaseException]) -> Any:
        """The call, or an error before or after it, or the end of the process."""
        if self.happens(0.15):
            raise Crash
        if self.happens():
            raise error()
        result = call()
        if self.happens():
            raise error()
        if self.happens(0.15):
            raise Crash
        return result


@dataclass
class MemoryStore:
    """The verbs of a store that manager and workers use; `fault` stands before and after each."""

    now: Callable[[], datetime]
    jobs: dict[str, JobRecord] = field(default_factory=dict[str, JobRecord])
    rows: dict[str, WorkerRow] = field(default_factory=dict[str, WorkerRow])
    keys: dict[str, KeyRecord] = field(default_factory=dict[str, KeyRecord])
    runs: list[RunRecord] = field(default_factory=list[RunRecord])
    log_bytes: dict[str, int] = field(default_factory=dict[str, int])
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    kept_logs: dict[int, bytes] = field(default_factory=dict[int, bytes])
    keep_days: float | None = None
    collected: list[datetime] = field(default_factory=list[datetime])
    completions: Counter[str] = field(default_factory=Counter[str])
    is_paused: bool = False

    def retention(self) -> tuple[int, float | None]:
        return 64, self.keep_days

    def collect_garbage(self, keep_s: float) -> Garbage:
        self.collected.append(self.now())
        return Garbage(0, 0, 0, 0)

    def manager_state(self) -> dict[str, Any]:
        return self.state

    def set_manager_state(self, state: dict[str, Any]) -> None:
        self.state = state

    # ---- the manager's side

    def pending_jobs(self) -> list[PendingRow]:
        return [PendingRow(job) for job in self.jobs.values() if self.is_due(job)]

    def is_due(self, job: JobRecord) -> bool:
        """Whether it waits for a worker, and for nothing else."""
        if self.is_paused or job.status != "pending":
            return False
        has_come = job.not_before is None or job.not_before <= self.now()
        has_room = job.max_running is None or len(self.running(job.label)) < job.max_running
        return has_come and has_room and self.are_completed(job.after)

    def are_completed(self, ids: Sequence[str]) -> bool:
        return all(self.jobs[id].status == "completed" for id in ids)

    def running(self, label: str | None) -> list[JobRecord]:
        jobs = self.jobs.values()
        return [job for job in jobs if job.status == "in_progress" and job.label == label]

    def worker_rows(self, worker_ids: Sequence[str] | None = None) -> list[WorkerRow]:
        if worker_ids is not None:
            return [self.rows[id] for id in worker_ids if id in self.rows]
        return [
            row
            for row in self.rows.values()
            if row.status != "terminated" or (row.pod_id is not None and row.ended_at is None)
        ]

    def list_jobs(self, *, statuses: Sequence[str], limit: int | None) -> list[JobRecord]:
        return [job for job in self.jobs.values() if job.status in statuses]

    def list_runs(
        self, *, worker_id: str, status: str | None = None, limit: int
    ) -> list[RunRecord]:
        runs = [run for run in self.runs if run.worker_id == worker_id]
        return [
            replace(run, log_bytes=self.log_bytes.get(run.job_id, 0))
            for run in runs
            if status is None or self.jobs[run.job_id].worker_id == worker_id
        ][-limit:]

    def append_log(self, run_id: int, offset: int, data: bytes) -> None:
        self.kept_logs[run_id] = data

    def create_worker(
        self, worker: WorkerSpec, *, provider: str, price_usd_per_hour: float | None
    ) -> None:
        old = self.rows.get(worker.id)
        if old is not None and (old.status != "starting" or old.pod_id is not None):
            raise InvalidStateError(f"worker {worker.id} is {old.status}")
        self.rows[worker.id] = WorkerRow(
            **{name: getattr(worker, name) for name in WorkerSpec.__dataclass_fields__},
            status="starting",
            created_at=self.now() if old is None else old.created_at,
            pinged_at=self.now(),
            provider=provider,
            price_usd_per_hour=price_usd_per_hour,
        )

    def set_worker_pod(self, worker_id: str, pod_id: str, price: float | None) -> None:
        row = self.rows[worker_id]
        if row.status == "terminated":
            raise InvalidStateError(f"worker {worker_id} is terminated")
        self._set(worker_id, pod_id=pod_id, started_at=row.started_at or self.now())

    def end_worker_pod(self, worker_id: str) -> None:
        self.set_worker_status(worker_id, "terminated")
        ended_at = self.rows[worker_id].ended_at or self.now()
        self._set(worker_id, ended_at=ended_at)

    def set_worker_status(self, worker_id: str, status: WorkerStatus) -> None:
        if self.rows[worker_id].status != "terminated":
            self._set(worker_id, status=status)
        if status == "terminated":
            self.lose(worker_id)

    def create_key(self, name: str, role: str, **options: Any) -> NewKey:
        key_id = f"key-{len(self.keys)}"
        worker_id = options["worker_id"]
        self.keys[key_id] = KeyRecord(key_id, name, "ow_", role, worker_id, self.now())
        return NewKey(key_id, f"ow_{key_id}")

    def list_keys(self) -> list[KeyRecord]:
        return list(self.keys.values())

    def revoke_key(self, key_id: str) -> None:
        self.keys[key_id] = replace(self.keys[key_id], revoked_at=self.now())

    # ---- the workers' side

    def register(self, worker_id: str, pod_id: str) -> bool:
        if self.rows[worker_id].status != "starting":
            return False
        self._set(worker_id, status="active", pod_id=pod_id, pinged_at=self.now())
        return True

    def ping(self, worker_id: str) -> None:
        self._set(worker_id, pinged_at=self.now())

    def claim(self, worker_id: str) -> JobRecord | None:
        row = self.rows[worker_id]
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            tiers = ("ALL", row.cloud_type)
            if not isinstance(job.params, dict) or "cloud_type" not in job.params:
                continue  # no worker would run it
            if self.is_due(job) and job.params["cloud_type"] in tiers:
                attempts = job.attempts + 1
                self._job(job.id, status="in_progress", worker_id=worker_id, attempts=attempts)
                number = len(self.runs) + 1
                self.runs.append(
                    RunRecord(number, job.id, worker_id, attempts, "in_progress", self.now())
                )
                return self.jobs[job.id]
        return None

    def finish(self, job_id: str) -> None:
        self.completions[job_id] += 1
        self._job(job_id, status="completed", worker_id=None)

    def fail(self, job_id: str) -> None:
        """As a job that is tried again, later."""
        job = self.jobs[job_id]
        assert job.retry is not None and job.retries < job.retry.max
        later = self.now() + timedelta(seconds=job.retry.backoff_s * 2**job.retries)
        retries = job.retries + 1
        self._job(job_id, status="pending", worker_id=None, retries=retries, not_before=later)

    def lose(self, worker_id: str) -> None:
        for job in self.jobs.values():
            if job.worker_id == worker_id:
                self._job(job.id, status="pending", worker_id=None)

    def _set(self, worker_id: str, **changes: Any) -> None:
        self.rows[worker_id] = replace(self.rows[worker_id], **changes)

    def _job(self, job_id: str, **changes: Any) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], **changes, updated_at=self.now())


class FaultyStore:
    """The store as the manager gets it: each call may fail, before or after it took effect."""

    def __init__(self, store: MemoryStore, faults: Faults) -> None:
        self._store = store
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        return lambda *args, **kwargs: self._faults.around(
            lambda: verb(*args, **kwargs), lambda: StoreUnavailableError("by the test")
        )
