"""Jobs that wait for others, as changes inside a write transaction that the caller holds.

A job waits until all of its `after` have completed, which they stay. When one of them fails or is
canceled, it fails, and so do those that wait for it; `failed_by` remembers why, so that they come
back when that one is queued again. Every function takes `now` in microseconds.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from openweights.backends import scheduling
from openweights.backends.scheduling import reason_of_dependent

_WAITING_FOR = (
    "SELECT id FROM jobs WHERE status = 'pending' AND after IS NOT NULL "
    "AND EXISTS (SELECT 1 FROM json_each(jobs.after) WHERE value = ?)"
)
_FAILED_BY = "SELECT * FROM jobs WHERE status = 'failed' AND after IS NOT NULL AND failed_by = ?"


def check_after(db: sqlite3.Connection, job_id: str, after: Sequence[str]) -> None:
    """See that a job can wait for these; raises what `scheduling.check_after` does."""
    scheduling.check_after(
        job_id, after, lambda other: _status(db, other), lambda other: needs(db, other)
    )


def check_none_failed(db: sqlite3.Connection, after: Sequence[str]) -> None:
    """As `scheduling.check_none_failed`."""
    scheduling.check_none_failed(after, lambda other: _status(db, other))


def needs(db: sqlite3.Connection, job_id: str) -> list[str]:
    """The ids that a job waits for, or waited for."""
    row = db.execute("SELECT after FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return [] if row is None or row["after"] is None else json.loads(row["after"])


def fail_dependents(db: sqlite3.Connection, job_id: str, status: str, now: int) -> None:
    """A job has ended with `status`, failed or canceled: fail what waits for it, and so on."""
    ended = [(job_id, status)]
    while ended:
        needed, how = ended.pop()
        for row in db.execute(_WAITING_FOR, (needed,)).fetchall():
            _fail(db, row["id"], needed, how, now)
            ended.append((row["id"], "failed"))


def revive_dependents(db: sqlite3.Connection, job_id: str, now: int) -> None:
    """A failed or canceled job is pending again: so is what had failed because of it, and so on."""
    revived = [job_id]
    while revived:
        for row in db.execute(_FAILED_BY, (revived.pop(),)).fetchall():
            ended = scheduling.ended_badly(
                json.loads(row["after"]), lambda other: _status(db, other)
            )
            if ended is not None:
                _fail(db, row["id"], *ended, now)
                continue
            db.execute(
                "UPDATE jobs SET status = 'pending', outputs = NULL, failed_by = NULL, "
                "lost_runs = 0, updated_at = ? WHERE id = ?",
                (now, row["id"]),
            )
            revived.append(row["id"])


def _fail(db: sqlite3.Connection, job_id: str, needed: str, how: str, now: int) -> None:
    outputs = json.dumps({"error": reason_of_dependent(needed, how)})
    db.execute(
        "UPDATE jobs SET status = 'failed', failed_by = ?, outputs = ?, updated_at = ? "
        "WHERE id = ?",
        (needed, outputs, now, job_id),
    )


def _status(db: sqlite3.Connection, job_id: str) -> str | None:
    row = db.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else row["status"]
