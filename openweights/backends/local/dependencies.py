"""Jobs that wait for others, as changes inside a write transaction that the caller holds.

A job waits until all of its `after` have completed, which they stay. When one of them fails or is
canceled, it fails, and so do those that wait for it; `failed_by` remembers why, so that they come
back when that one is queued again. Every function takes `now` in microseconds.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from openweights.backends.scheduling import cycle_refused, cycle_through, reason_of_dependent
from openweights.errors import InvalidInputError, InvalidStateError, shown

_WAITING_FOR = (
    "SELECT id FROM jobs WHERE status = 'pending' AND after IS NOT NULL "
    "AND EXISTS (SELECT 1 FROM json_each(jobs.after) WHERE value = ?)"
)
_FAILED_BY = "SELECT * FROM jobs WHERE status = 'failed' AND after IS NOT NULL AND failed_by = ?"


def check_after(db: sqlite3.Connection, job_id: str, after: Sequence[str]) -> None:
    """See that a job can wait for these.

    Raises:
        InvalidInputError: One does not exist, or waits for this one.
        InvalidStateError: One has failed or was canceled.
    """
    for needed in after:
        if needed != job_id and _status(db, needed) is None:
            raise InvalidInputError(f"after: there is no job {shown(needed)}; correct the id")
    path = cycle_through(job_id, after, lambda other: needs(db, other))
    if path is not None:
        raise InvalidInputError(cycle_refused(path))
    check_none_failed(db, after)


def check_none_failed(db: sqlite3.Connection, after: Sequence[str]) -> None:
    """See that nothing keeps a job from waiting for these, as it did before.

    Raises:
        InvalidStateError: One has failed or was canceled.
    """
    ended = _ended_badly(db, after)
    if ended is not None:
        raise InvalidStateError(
            f"after: job {ended[0]} is {ended[1]}: restart it first, with `ow restart {ended[0]}`"
        )


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
            ended = _ended_badly(db, json.loads(row["after"]))
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


def _ended_badly(db: sqlite3.Connection, after: Sequence[str]) -> tuple[str, str] | None:
    """The first of them that has failed or was canceled, and which."""
    for needed in after:
        status = _status(db, needed)
        if status in ("failed", "canceled"):
            return needed, status
    return None


def _status(db: sqlite3.Connection, job_id: str) -> str | None:
    row = db.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else row["status"]
