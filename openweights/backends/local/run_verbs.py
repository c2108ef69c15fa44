"""Runs of jobs, their events and their logs."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from openweights.backends.local import lifecycle, records
from openweights.backends.local.failures import clear_errors
from openweights.backends.local.store import Store, find, matching, note
from openweights.backends.values import (
    check_event_bytes,
    check_log_end,
    checked_span,
    moment_within,
    readable,
)
from openweights.errors import FencedError, InvalidInputError, InvalidStateError
from openweights.json_values import storable, to_json
from openweights.types import (
    ENDED,
    Claim,
    EventDraft,
    EventRecord,
    JobRecord,
    JobSpec,
    RunRecord,
    RunStatus,
)

_EVENTS_PER_PAGE = 1000


class RunVerbs(Store):
    """The part of `Backend` about runs, events and logs."""

    def get_run(self, run_id: int) -> RunRecord:
        with self._read() as db:
            return self._run(lifecycle.run_with_job(db, run_id))

    def list_runs(
        self,
        *,
        job_id: str | None = None,
        worker_id: str | None = None,
        status: RunStatus | None = None,
        limit: int | None = None,
    ) -> list[RunRecord]:
        query, values = matching(
            "SELECT * FROM runs", {"job_id": job_id, "worker_id": worker_id, "status": status}
        )
        with self._read() as db:
            self._check_exists(db, job_id=job_id, worker_id=worker_id)
            query += " ORDER BY id DESC LIMIT ?"
            rows = db.execute(query, (*values, -1 if limit is None else limit)).fetchall()
        return list(readable(self._run, reversed(rows), "run"))

    def start_script_run(self, spec: JobSpec) -> Claim:
        columns = {**records.job_columns(spec), "type": "script", "after": None}
        with self._write() as db:
            if find(db, "jobs", spec.id) is not None:
                raise InvalidStateError(
                    f"job {spec.id} exists: a script run needs an id of its own"
                )
            now = self._now()
            self._insert_job(db, columns, now)
            note(db, "job.script", spec.id, now)
            row = find(db, "jobs", spec.id)
            assert row is not None
            return self._start(db, row, None, None, now)

    def finish_run(
        self,
        run_id: int,
        attempt: int,
        status: Literal["completed", "failed", "canceled"],
        *,
        error: str | None = None,
        exit_code: int | None = None,
        cause: str | None = None,
    ) -> JobRecord:
        with self._write() as db:
            run = lifecycle.run_with_job(db, run_id)
            final = "canceled" if run["job_status"] == "canceled" else status
            was_retried = (
                final == "failed" and run["job_status"] == "pending" and run["retries"] > 0
            )
            is_repeated = run["status"] == final and (run["job_status"] == final or was_retried)
            if lifecycle.check_current(run, attempt, is_repeated=is_repeated):
                now = self._now()
                lifecycle.end_run(db, run_id, final, "finish", error, now, exit_code, cause)
                if final != "failed" or not lifecycle.retry_job(db, run, cause, exit_code, now):
                    outputs = lifecycle.latest_of_run(db, run_id)
                    lifecycle.end_job(db, run["job_id"], final, outputs, now)
            return self._job(db, run["job_id"])

    def release_run(
        self, run_id: int, attempt: int, *, reason: str, is_lost: bool = False
    ) -> JobRecord:
        with self._write() as db:
            run = lifecycle.run_with_job(db, run_id)
            is_repeated = run["ended_by"] == "release"
            if lifecycle.check_current(run, attempt, is_repeated=is_repeated):
                if is_lost:
                    lifecycle.lose_run(db, run, "release", self._now(), reason)
                else:
                    lifecycle.release_run(db, run, reason, self._now())
            return self._job(db, run["job_id"])

    def touch_run(self, run_id: int) -> None:
        with self._write() as db:
            lifecycle.run_with_job(db, run_id)
            lifecycle.note_sign_of_life(db, run_id, self._now())

    def append_events(self, run_id: int, events: Sequence[EventDraft]) -> None:
        rows = [
            (
                run_id,
                storable(event.key),
                to_json(dict(event.data), "an event's data"),
                records.to_micros(moment_within(event.created_at)),
            )
            for event in events
        ]
        size = sum(len(data) for _, _, data, _ in rows)
        with self._write() as db:
            run = lifecycle.run_with_job(db, run_id)
            check_event_bytes(run_id, run["event_bytes"], size)
            if run["attempt"] != run["job_attempts"]:
                raise FencedError(
                    f"run {run_id} of job {run['job_id']} was replaced by attempt "
                    f"{run['job_attempts']}: its events are not taken any more"
                )
            cursor = db.executemany(
                "INSERT INTO events (run_id, key, data, created_at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (run_id, key) DO NOTHING",
                rows,
            )
            if cursor.rowcount > 0:
                count = "UPDATE runs SET event_bytes = event_bytes + ? WHERE id = ?"
                db.execute(count, (size, run_id))
            is_late = run["status"] != "in_progress" and run["job_status"] in ENDED
            if is_late and cursor.rowcount > 0:
                outputs = lifecycle.latest_of_run(db, run_id)
                lifecycle.end_job(db, run["job_id"], run["job_status"], outputs, self._now())

    def list_events(
        self,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
        after: int = 0,
        type: str | None = None,
    ) -> Iterator[EventRecord]:
        with self._read() as db:
            run_ids = self._run_ids(db, job_id, run_id)
        # Each run is read along its index; a query over all runs of a job would sort at every page.
        pages = [self._events_of_run(run_id, after, type) for run_id in run_ids]
        return heapq.merge(*pages, key=lambda event: event.id)

    def _events_of_run(self, run_id: int, after: int, kind: str | None) -> Iterator[EventRecord]:
        # Spelled as in the index `events_of_type`.
        of_type = "" if kind is None else " AND json_extract(data, '$.type') = :type"
        query = f"SELECT * FROM events WHERE run_id = :run{of_type} AND id > :after ORDER BY id"  # noqa: S608 - one of two texts
        values = {"run": run_id, "type": kind, "limit": _EVENTS_PER_PAGE}
        while True:
            with self._read() as db:
                page = db.execute(f"{query} LIMIT :limit", {**values, "after": after}).fetchall()
            yield from readable(records.event_record, page, "event")
            if len(page) < _EVENTS_PER_PAGE:
                return
            after = page[-1]["id"]

    def latest_values(
        self,
        keys: Sequence[str] | None = None,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
    ) -> dict[str, Any]:
        with self._read() as db:
            run_ids = self._run_ids(db, job_id, run_id)
            return lifecycle.latest_of_run(db, run_ids[-1], keys) if run_ids else {}

    def append_log(self, run_id: int, offset: int, data: bytes) -> None:
        with self._read() as db:
            lifecycle.run_with_job(db, run_id)
        check_log_end(run_id, offset + len(data), self.log_limit_bytes)
        with clear_errors(self.home):
            self._logs.write(run_id, offset, data)

    def read_log(self, run_id: int, offset: int = 0, limit: int = 1 << 20) -> bytes:
        offset, limit = checked_span(offset, limit)
        with self._read() as db:
            lifecycle.run_with_job(db, run_id)
        with clear_errors(self.home):
            return self._logs.read(run_id, offset, limit)

    def _run_ids(self, db: sqlite3.Connection, job_id: str | None, run_id: int | None) -> list[int]:
        """The run, or the runs of the job from the first to the last."""
        if (job_id is None) == (run_id is None):
            raise InvalidInputError("give either job_id or run_id")
        if run_id is not None:
            return [lifecycle.run_with_job(db, run_id)["id"]]
        self._check_exists(db, job_id=job_id, worker_id=None)
        rows = db.execute("SELECT id FROM runs WHERE job_id = ? ORDER BY attempt", (job_id,))
        return [row["id"] for row in rows]
