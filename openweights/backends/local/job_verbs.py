"""Jobs: submission, listing and what users do to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from openweights.backends.local import dependencies, lifecycle, records
from openweights.backends.local.store import Store, find, matching, note
from openweights.backends.values import check_number, readable
from openweights.errors import InvalidStateError
from openweights.json_values import cleaned, contains
from openweights.types import (
    ENDED,
    JOB_STATUSES,
    AuditRecord,
    JobRecord,
    JobSpec,
    JobStatus,
    QueuePlace,
    QueueState,
)

_SYNCED = (
    *("docker_image", "requires_vram_gb", "allowed_hardware", "bundle_file", "params"),
    *("after", "not_before", "label", "max_running"),
    *("max_duration_s", "stall_timeout_s", "retry"),
)

_LIKE_IT = "SELECT count(*) FROM jobs WHERE label = ? AND status = 'in_progress' AND id != ?"


class JobVerbs(Store):
    """The part of `Backend` about jobs."""

    def submit_job(self, spec: JobSpec) -> JobRecord:
        columns = records.job_columns(spec)
        with self._write() as db:
            row = find(db, "jobs", spec.id)
            now = self._now()
            if row is None:
                dependencies.check_after(db, spec.id, spec.after)
                self._insert_job(db, columns, now)
                note(db, "job.submit", spec.id, now)
            elif row["status"] in ("failed", "canceled"):
                dependencies.check_after(db, spec.id, spec.after)
                _update_job(db, spec.id, columns, now)
                _queue_again(db, spec.id, now)
                note(db, "job.resubmit", spec.id, now)
            elif row["status"] == "pending":
                synced = _synced(row, columns)
                if "after" in synced:
                    dependencies.check_after(db, spec.id, spec.after)
                if synced:
                    _update_job(db, spec.id, synced, now)
                    note(db, "job.change", spec.id, now)
            return self._job(db, spec.id)

    def get_job(self, job_id: str) -> JobRecord:
        with self._read() as db:
            return self._job(db, job_id)

    def list_jobs(
        self,
        *,
        statuses: Sequence[JobStatus] | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int | None = 100,
    ) -> list[JobRecord]:
        wanted = JOB_STATUSES if statuses is None else tuple(dict.fromkeys(statuses))
        if not wanted:
            return []
        # One branch per status, so that each is read from the index in order and merged.
        query = " UNION ALL ".join(["SELECT * FROM jobs WHERE status = ?"] * len(wanted))
        query += " ORDER BY updated_at DESC, seq DESC"
        part = None if where is None else cleaned(where, "where")
        found: list[JobRecord] = []
        with self._read() as db:
            rows = db.execute(query, wanted)
            jobs = readable(lambda row: records.job_record(row, self.organization_id), rows, "job")
            for job in jobs if limit is None or limit > 0 else ():
                if part is None or contains(job.params, part):
                    found.append(job)
                if len(found) == limit:
                    break
        return found

    def cancel_job(self, job_id: str) -> JobRecord:
        with self._write() as db:
            job = self._job(db, job_id)
            if job.status in ("completed", "failed"):
                raise InvalidStateError(f"job {job_id} has {job.status}: nothing is left to cancel")
            if job.status != "canceled":
                self._cancel(db, job)
            return self._job(db, job_id)

    def _cancel(self, db: sqlite3.Connection, job: JobRecord) -> None:
        now = self._now()
        note(db, "job.cancel", job.id, now, status=job.status)
        db.execute(
            "UPDATE jobs SET status = 'canceled', worker_id = NULL, updated_at = ? WHERE id = ?",
            (now, job.id),
        )
        if job.status == "in_progress" and job.worker_id is None:
            # No worker will ever report that it has stopped a script's run.
            lifecycle.end_run_of_canceled_job(db, job.id, now)
            outputs = lifecycle.latest_of_run(db, _last_run(db, job.id))
            lifecycle.end_job(db, job.id, "canceled", outputs, now)
        else:
            dependencies.fail_dependents(db, job.id, "canceled", now)

    def restart_job(self, job_id: str) -> JobRecord:
        with self._write() as db:
            job = self._job(db, job_id)
            if job.status not in ("failed", "canceled"):
                raise InvalidStateError(
                    f"job {job_id} is {job.status}: only a failed or canceled job can be restarted"
                )
            if job.type == "script":
                raise InvalidStateError(
                    f"job {job_id} ran outside any worker: run its script again instead"
                )
            dependencies.check_none_failed(db, job.after)
            now = self._now()
            _update_job(db, job_id, {"not_before": None}, now)  # who restarts it wants it now
            _queue_again(db, job_id, now)
            note(db, "job.restart", job_id, now)
            return self._job(db, job_id)

    def set_timeout(self, job_id: str, timeout_at: datetime | None) -> JobRecord:
        value = None if timeout_at is None else records.to_micros(timeout_at)
        with self._write() as db:
            self._job(db, job_id)
            now = self._now()
            _update_job(db, job_id, {"timeout_at": value}, now)
            until = None if timeout_at is None else timeout_at.isoformat()
            note(db, "job.timeout", job_id, now, timeout_at=until)
            return self._job(db, job_id)

    def place_in_queue(self, job: JobRecord | None = None) -> QueuePlace:
        with self._read() as db:
            now = self._now()
            if job is None:
                return QueuePlace(ahead=lifecycle.ahead_of(db, None, 0, 0, now))
            created_at = records.to_micros(job.created_at)
            return QueuePlace(
                _unfinished(db, job),
                db.execute(_LIKE_IT, (job.label, job.id)).fetchone()[0],
                lifecycle.ahead_of(db, job.id, job.priority, created_at, now),
            )

    def queue_state(self) -> QueueState:
        with self._read() as db:
            return records.queue_state(lifecycle.queue(db))

    def set_paused(self, is_paused: bool) -> QueueState:
        with self._write() as db:
            now = self._now()
            db.execute(
                "UPDATE queue SET paused_at = CASE WHEN :pause THEN coalesce(paused_at, :now) END",
                {"pause": is_paused, "now": now},
            )
            note(db, "queue.pause" if is_paused else "queue.resume", None, now)
            return records.queue_state(lifecycle.queue(db))

    def set_max_duration(self, seconds: float | None) -> QueueState:
        check_number("max_duration_s", seconds)
        with self._write() as db:
            db.execute("UPDATE queue SET max_duration_s = ?", (seconds,))
            note(db, "queue.max_duration", None, self._now(), seconds=seconds)
            return records.queue_state(lifecycle.queue(db))

    def list_audit(self, *, target: str | None = None, limit: int = 100) -> list[AuditRecord]:
        query, values = matching("SELECT * FROM audit", {"target": target})
        with self._read() as db:
            rows = db.execute(f"{query} ORDER BY id DESC LIMIT ?", (*values, limit)).fetchall()
        return list(readable(records.audit_record, rows, "a change"))


def _queue_again(db: sqlite3.Connection, job_id: str, now: int) -> None:
    """Put a failed or canceled job back to pending, with those that failed because it had."""
    lifecycle.end_run_of_canceled_job(db, job_id, now)
    _update_job(db, job_id, {"retries": 0}, now)
    lifecycle.requeue_job(db, job_id, 0, now)
    dependencies.revive_dependents(db, job_id, now)


def _unfinished(db: sqlite3.Connection, job: JobRecord) -> tuple[tuple[str, JobStatus], ...]:
    """Those that it waits for."""
    query = "SELECT status FROM jobs WHERE id = ?"
    rows = ((needed, db.execute(query, (needed,)).fetchone()) for needed in job.after)
    return tuple((id, row[0]) for id, row in rows if row and row[0] not in ENDED and id != job.id)


def _last_run(db: sqlite3.Connection, job_id: str) -> int:
    query = "SELECT id FROM runs WHERE job_id = ? ORDER BY attempt DESC LIMIT 1"
    return db.execute(query, (job_id,)).fetchone()["id"]


def _update_job(db: sqlite3.Connection, job_id: str, columns: Mapping[str, Any], now: int) -> None:
    names = ", ".join(f"{name} = ?" for name in columns)
    values = (*columns.values(), now, job_id)
    db.execute(f"UPDATE jobs SET {names}, updated_at = ? WHERE id = ?", values)


def _synced(row: sqlite3.Row, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a resubmission changes in a job that still waits: where it may run, not what it does."""
    wanted = {**columns, "params": records.with_cloud_type(row["params"], columns["params"])}
    return {name: wanted[name] for name in _SYNCED if wanted[name] != row[name]}
