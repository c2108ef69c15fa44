"""Workers: registration, liveness, claims and heartbeats."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from openweights.backends.local import lifecycle, records
from openweights.backends.local.failures import clear_errors
from openweights.backends.local.store import RUNS, Store, insert
from openweights.backends.local.worker_locks import is_locked
from openweights.backends.values import readable
from openweights.types import Claim, Instruction, WorkerRecord, WorkerSpec, WorkerStatus

# How often, at most, a claim looks whether workers have died, and at how many.
_PROBE_INTERVAL_S = 0.2
_PROBE_LIMIT = 64


class WorkerVerbs(Store):
    """The part of `Backend` about workers."""

    _next_probe = 0.0
    _is_swept = False

    def register_worker(self, worker: WorkerSpec) -> WorkerRecord:
        columns = records.worker_columns(worker)
        if not self._is_swept:
            self._sweep()
        with self._read():  # makes the home, should it be gone
            # Before the row, so that nobody sees an active worker without a lock.
            is_new = self._locks.take(worker.id)
        try:
            with self._write() as db:
                now = self._now()
                lifecycle.lose_runs_of_worker(db, worker.id, now)
                db.execute("DELETE FROM workers WHERE id = ?", (worker.id,))
                insert(
                    db,
                    "workers",
                    {
                        **columns,
                        "status": "active",
                        "incarnation": os.urandom(8).hex(),
                        "created_at": now,
                        "pinged_at": now,
                    },
                )
                return records.worker_record(self._worker(db, worker.id))
        except BaseException:
            if is_new:
                self._locks.release(worker.id)
            raise

    def list_workers(self, *, statuses: Sequence[WorkerStatus] | None = None) -> list[WorkerRecord]:
        self._end_dead_workers()
        with self._read() as db:
            rows = db.execute("SELECT * FROM workers ORDER BY created_at DESC, seq DESC")
            workers = list(readable(records.worker_record, rows, "worker"))
        return [w for w in workers if statuses is None or w.status in statuses]

    def set_worker_status(self, worker_id: str, status: WorkerStatus) -> WorkerRecord:
        with self._write() as db:
            self._worker(db, worker_id)
            # A worker that has ended stays so: only registering makes a new one of that id.
            db.execute(
                "UPDATE workers SET status = ? WHERE id = ? AND status != 'terminated'",
                (status, worker_id),
            )
            if status == "terminated":
                lifecycle.lose_runs_of_worker(db, worker_id, self._now())
            worker = records.worker_record(self._worker(db, worker_id))
        if worker.status == "terminated":
            with clear_errors(self.home):
                self._locks.release(worker_id)
        return worker

    def claim_job(self, worker_id: str) -> Claim | None:
        if time.monotonic() >= self._next_probe:
            self._end_dead_workers(_PROBE_LIMIT)
        with self._write() as db:
            worker = self._worker(db, worker_id)
            now = self._now()
            lifecycle.lose_expired_runs(db, now, worker_id, self._is_running)
            expires_at = self._lease_from(now)
            held = lifecycle.held_run(db, worker_id)
            if held is not None and held["job_status"] == "in_progress":
                lifecycle.renew_lease(db, worker, held, expires_at, now)
                return Claim(self._job(db, held["job_id"]), self._run(held))
            if held is not None:
                # It was canceled, and the worker runs nothing: it would not be asking.
                lifecycle.lose_run(db, held, "worker", now)
            if worker["status"] != "active":
                return None
            job = lifecycle.next_job(db, self._lane, worker_id, now)
            if job is None:
                return None
            claim = self._start(db, job, worker_id, expires_at, now)
            clock = lifecycle.RunClock(now, self._steady())
            self._run_clocks[worker_id] = claim.run.id, clock
            return claim

    def heartbeat(self, worker_id: str, run_id: int | None = None) -> Instruction:
        with self._write() as db:
            worker = self._worker(db, worker_id)
            run = None if run_id is None else lifecycle.run_with_job(db, run_id)
            now = self._now()
            db.execute("UPDATE workers SET pinged_at = ? WHERE id = ?", (now, worker_id))
            if run is not None and not lifecycle.renew_lease(
                db, worker, run, self._lease_from(now), now
            ):
                return "fenced"
            if run is None:
                return lifecycle.instruction(worker, None, now)
            clock = self._clock_of(worker_id, run["id"], now)
            if clock.was_set:
                lifecycle.note_sign_of_life(db, run["id"], now)
                run = lifecycle.run_with_job(db, run["id"])
            if run["stall_timeout_s"] is not None:
                run = lifecycle.listen(db, run, self._logs.size(run["id"]), now)
            return lifecycle.instruction(worker, run, now, clock.skipped)

    def _clock_of(self, worker_id: str, run_id: int, now: int) -> lifecycle.RunClock:
        steady = self._steady()
        known, clock = self._run_clocks.get(worker_id, (None, None))
        fresh = lifecycle.RunClock(now, steady)
        clock = fresh if clock is None or known != run_id else clock.after(now, steady)
        self._run_clocks[worker_id] = run_id, clock
        return clock

    def _end_dead_workers(self, limit: int = -1) -> None:
        """Look at workers, those silent for the longest first, and end what the dead ones held."""
        self._next_probe = time.monotonic() + _PROBE_INTERVAL_S
        query = (
            "SELECT id, incarnation FROM workers WHERE status != 'terminated' "
            "ORDER BY pinged_at LIMIT ?"
        )
        with self._read() as db:
            living = [(row["id"], row["incarnation"]) for row in db.execute(query, (limit,))]
        with clear_errors(self.home):
            dead = [worker for worker in living if not self._locks.is_held(worker[0])]
        if dead:
            self._mark_terminated(dead)

    def _mark_terminated(self, dead: Iterable[tuple[str, str]]) -> None:
        with self._write() as db:
            for worker_id, incarnation in dead:
                # It may have been registered again since its lock was looked at.
                cursor = db.execute(
                    "UPDATE workers SET status = 'terminated' WHERE id = ? AND incarnation = ?",
                    (worker_id, incarnation),
                )
                if cursor.rowcount:
                    lifecycle.lose_runs_of_worker(db, worker_id, self._now())
        with clear_errors(self.home):
            for worker_id, _ in dead:
                self._locks.remove(worker_id)

    def _sweep(self) -> None:
        """Remove what ended processes have left in the folders; once per object is enough."""
        self._end_dead_workers()
        with self._read() as db:
            rows = db.execute("SELECT id FROM workers WHERE status != 'terminated'")
            alive = {row["id"] for row in rows}
        with clear_errors(self.home):
            self._locks.sweep(alive)
            self._files.sweep()
        self._is_swept = True

    def _is_running(self, run_id: int) -> bool:
        """Whether a run's folder is in use: its worker and its guard hold the lock on it."""
        return is_locked(self.home / RUNS / str(run_id))

    def _lease_from(self, now: int) -> int:
        return now + int(self.lease_s * 1_000_000)
