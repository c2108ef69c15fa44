"""The life of jobs and runs, as changes inside a write transaction that the caller holds.

    job:  pending -> in_progress -> completed | failed | canceled
          pending -> failed                      a job that it waits for has failed
          in_progress -> pending                 its run was released, or lost
          failed | canceled -> pending           resubmitted or restarted
    run:  in_progress -> completed | failed | canceled
          failed -> in_progress                  a lease that ran out is won back

A job in progress has exactly one run in progress, and its `attempts` is that run's attempt number.
A canceled job may still have one, until its worker has stopped it. Every function takes `now` in
microseconds.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from openweights.backends.local.dependencies import fail_dependents
from openweights.backends.local.records import retry_of
from openweights.backends.scheduling import pause_before_retry
from openweights.backends.values import MOST_TEXT
from openweights.errors import FencedError, NotFoundError
from openweights.json_values import storable
from openweights.types import MOST_QUESTIONS, QUESTION_PRIORITY, SERVED, Ahead, Instruction, Lane

_RUN_WITH_JOB = """
    SELECT runs.*, jobs.status AS job_status, jobs.attempts AS job_attempts,
           jobs.lost_runs, jobs.max_attempts, jobs.timeout_at, jobs.retry, jobs.retries,
           jobs.stall_timeout_s,
           coalesce(jobs.max_duration_s, (SELECT max_duration_s FROM queue)) AS max_duration_s
    FROM runs JOIN jobs ON jobs.id = runs.job_id
"""
_IS_QUESTION = f"(jobs.type = 'inference' AND jobs.priority >= {QUESTION_PRIORITY})"
# Named, because the planner cannot know how few jobs wait and would sort them all.
_PENDING = "FROM jobs INDEXED BY jobs_pending WHERE status = 'pending' "
_MAY_RUN = (
    "AND (after IS NULL OR NOT EXISTS (SELECT 1 FROM json_each(jobs.after) "
    "JOIN jobs AS needed ON needed.id = value WHERE needed.status != 'completed')) "
    "AND (not_before IS NULL OR not_before <= :now) "
    "AND (max_running IS NULL OR max_running > (SELECT count(*) FROM jobs AS others "
    "WHERE others.label = jobs.label AND others.status = 'in_progress')) "
)
_NEXT_JOB = (
    f"SELECT *, {_IS_QUESTION} AS is_question {_PENDING}"
    "AND (:lane IS NULL OR (type = :served) = (:lane = 'servers')) "
    f"AND (:questions IS NULL OR {_IS_QUESTION} = :questions) "
    f"{_MAY_RUN} ORDER BY priority DESC, created_at, seq LIMIT 1"
)
_AHEAD = (
    f"{_PENDING}{_MAY_RUN} AND (:id IS NULL OR id != :id "
    "AND (-priority, created_at, id) < (-:priority, :created_at, :id)) "
)
_AHEAD_COUNTED = (
    "SELECT count(*) AS total, count(*) FILTER (WHERE type != :served) AS ending, "
    f"count(*) FILTER (WHERE {_IS_QUESTION}) AS questions {_AHEAD}"
)
_AHEAD_FIRST = (
    f"SELECT id, requires_vram_gb {_AHEAD} AND type != :served "
    f"AND {_IS_QUESTION} >= :questions ORDER BY priority DESC, created_at, id LIMIT 1"
)
# Only among the newest runs: what a worker has done is not found by an index.
_QUESTIONS_ON_END = (
    f"SELECT count(*) FROM (SELECT {_IS_QUESTION} AS is_question FROM runs "
    "JOIN jobs ON jobs.id = runs.job_id WHERE runs.worker_id = ? "
    "AND runs.id > (SELECT max(id) FROM runs) - 500 ORDER BY runs.id DESC LIMIT ?) "
    "WHERE is_question"
)


def run_with_job(db: sqlite3.Connection, run_id: int) -> sqlite3.Row:
    """The run, with `job_status`, `job_attempts` and what else of its job decides its fate."""
    row = db.execute(_RUN_WITH_JOB + "WHERE runs.id = ?", (run_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"no run {run_id}")
    return row


def held_run(db: sqlite3.Connection, worker_id: str) -> sqlite3.Row | None:
    """The run in progress of a worker."""
    query = _RUN_WITH_JOB + "WHERE runs.worker_id = ? AND runs.status = 'in_progress'"
    return db.execute(query, (worker_id,)).fetchone()


def next_job(
    db: sqlite3.Connection, lane: Lane | None, worker_id: str, now: int
) -> sqlite3.Row | None:
    """The job of a lane to take, of those that wait for nothing else: priority, then oldest; but
    another one than a question after many questions on end.
    """
    if queue(db)["paused_at"] is not None:
        return None
    values = {"lane": lane, "served": SERVED, "now": now, "questions": None}
    if lane == "questions":
        values["questions"] = 1
    found = db.execute(_NEXT_JOB, values).fetchone()
    if lane == "questions" or found is None or not found["is_question"]:
        return found
    on_end = db.execute(_QUESTIONS_ON_END, (worker_id, MOST_QUESTIONS)).fetchone()[0]
    if on_end < MOST_QUESTIONS:
        return found
    return db.execute(_NEXT_JOB, {**values, "questions": 0}).fetchone() or found


def ahead_of(
    db: sqlite3.Connection, job_id: str | None, priority: int, created_at: int, now: int
) -> Ahead:
    """What workers take before a job; before one that comes last where `job_id` is None."""
    if queue(db)["paused_at"] is not None:
        return Ahead()
    values = {"id": job_id, "priority": priority, "created_at": created_at}
    values |= {"served": SERVED, "now": now}
    counts = db.execute(_AHEAD_COUNTED, values).fetchone()
    first, question = (
        db.execute(_AHEAD_FIRST, {**values, "questions": only}).fetchone() if counts[name] else None
        for only, name in enumerate(("ending", "questions"))
    )
    return Ahead(
        **dict(counts),
        first=first and first["id"],
        first_question=question and question["id"],
        question_gb=question["requires_vram_gb"] if question else 0,
    )


def queue(db: sqlite3.Connection) -> sqlite3.Row:
    """What holds for all jobs."""
    return db.execute("SELECT * FROM queue").fetchone()


def start_run(
    db: sqlite3.Connection,
    job: sqlite3.Row,
    worker_id: str | None,
    lease_expires_at: int | None,
    now: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a pending job in progress with a new run; returns the new columns of both."""
    attempt = job["attempts"] + 1
    both = {"status": "in_progress", "worker_id": worker_id}
    new_job = {**both, "attempts": attempt, "updated_at": now}
    db.execute(
        "UPDATE jobs SET status = :status, attempts = :attempts, worker_id = :worker_id, "
        "updated_at = :updated_at WHERE seq = :seq",
        {**new_job, "seq": job["seq"]},
    )
    new_run = {**both, "job_id": job["id"], "attempt": attempt, "created_at": now}
    cursor = db.execute(
        "INSERT INTO runs (id, job_id, worker_id, attempt, status, lease_expires_at, created_at) "
        "SELECT 1 + max(last_run.id, (SELECT coalesce(max(id), 0) FROM runs)), :job_id, "
        ":worker_id, :attempt, :status, :lease_expires_at, :created_at FROM last_run",
        {**new_run, "lease_expires_at": lease_expires_at},
    )
    unknown = dict.fromkeys(("ended_at", "error", "exit_code", "cause", "is_given_back"))
    return new_job, {**new_run, **unknown, "id": cursor.lastrowid}


def end_run(
    db: sqlite3.Connection,
    run_id: int,
    status: str,
    ended_by: str,
    error: str | None,
    now: int,
    exit_code: int | None = None,
    cause: str | None = None,
) -> None:
    """End a run, whatever becomes of its job."""
    text = None if error is None else storable(error)[:MOST_TEXT]
    db.execute(
        "UPDATE runs SET status = ?, ended_by = ?, error = ?, exit_code = ?, cause = ?, "
        "ended_at = ?, lease_expires_at = NULL WHERE id = ?",
        (status, ended_by, text, exit_code, cause, now, run_id),
    )


def end_job(
    db: sqlite3.Connection, job_id: str, status: str, outputs: Mapping[str, Any], now: int
) -> None:
    """Put a job into a final status, or keep it there, with the outputs of its last run."""
    db.execute(
        "UPDATE jobs SET status = ?, outputs = ?, worker_id = NULL, updated_at = ? WHERE id = ?",
        (status, json.dumps(outputs), now, job_id),
    )
    if status != "completed":
        fail_dependents(db, job_id, status, now)


def requeue_job(db: sqlite3.Connection, job_id: str, lost_runs: int, now: int) -> None:
    """Put a job back to pending; `lost_runs` of its allowance are used up from now on."""
    db.execute(
        "UPDATE jobs SET status = 'pending', outputs = NULL, worker_id = NULL, failed_by = NULL, "
        "lost_runs = ?, updated_at = ? WHERE id = ?",
        (lost_runs, now, job_id),
    )


def retry_job(
    db: sqlite3.Connection, run: sqlite3.Row, cause: str | None, exit_code: int | None, now: int
) -> bool:
    """Queue a job whose run has failed for later, if its `retry` allows that; whether it does."""
    pause_s = pause_before_retry(retry_of(run), run["retries"], cause, exit_code)
    if pause_s is None:
        return False
    requeue_job(db, run["job_id"], run["lost_runs"], now)
    db.execute(
        "UPDATE jobs SET retries = retries + 1, not_before = ? WHERE id = ?",
        (now + int(pause_s * 1_000_000), run["job_id"]),
    )
    return True


def release_run(db: sqlite3.Connection, run: sqlite3.Row, reason: str, now: int) -> None:
    """End a run that its worker gives back in good order: nothing of the allowance is used up."""
    if run["job_status"] == "canceled":
        end_run(db, run["id"], "canceled", "release", reason, now)
        end_job(db, run["job_id"], "canceled", latest_of_run(db, run["id"]), now)
    else:
        end_run(db, run["id"], "failed", "release", reason, now)
        db.execute("UPDATE runs SET is_given_back = 1 WHERE id = ?", (run["id"],))
        requeue_job(db, run["job_id"], run["lost_runs"], now)


def lose_run(
    db: sqlite3.Connection, run: sqlite3.Row, ended_by: str, now: int, reason: str | None = None
) -> None:
    """End a run whose worker is gone, or that hangs: its job waits again, unless its allowance is
    used up.

    Args:
        run: From `run_with_job` or `held_run`.
        ended_by: `lease` when the worker was silent, `worker` when it is known to be gone.
    """
    worker = run["worker_id"]
    error = reason or f"worker {worker} is gone"
    if ended_by == "lease":
        error = f"worker {worker} was silent for longer than its lease"
    if run["job_status"] == "canceled":
        end_run(db, run["id"], "canceled", ended_by, error, now)
        end_job(db, run["job_id"], "canceled", latest_of_run(db, run["id"]), now)
        return
    lost_runs = run["lost_runs"] + 1
    is_final = lost_runs >= run["max_attempts"]
    if is_final:
        error += f"; the job has lost {lost_runs} of at most {run['max_attempts']} runs"
    end_run(db, run["id"], "failed", ended_by, error, now)
    if is_final:
        db.execute("UPDATE jobs SET lost_runs = ? WHERE id = ?", (lost_runs, run["job_id"]))
        end_job(db, run["job_id"], "failed", latest_of_run(db, run["id"]), now)
    else:
        requeue_job(db, run["job_id"], lost_runs, now)


def lose_runs_of_worker(db: sqlite3.Connection, worker_id: str, now: int) -> None:
    """End what a worker holds that is known to be gone."""
    run = held_run(db, worker_id)
    if run is not None:
        lose_run(db, run, "worker", now)


def lose_expired_runs(
    db: sqlite3.Connection, now: int, keep_worker: str, is_running: Callable[[int], bool]
) -> None:
    """End the runs whose lease is over, except those of the worker that is asking, and those that
    still have processes: their worker may be stopped, but a job must not run twice at a time.
    """
    query = "WHERE runs.status = 'in_progress' AND runs.lease_expires_at < ?"
    for run in db.execute(_RUN_WITH_JOB + query, (now,)).fetchall():
        if run["worker_id"] != keep_worker and not is_running(run["id"]):
            lose_run(db, run, "lease", now)


def end_run_of_canceled_job(db: sqlite3.Connection, job_id: str, now: int) -> None:
    """End the run that a canceled job may still have, because nobody has to wait for it."""
    query = "SELECT id FROM runs WHERE job_id = ? AND status = 'in_progress'"
    run = db.execute(query, (job_id,)).fetchone()
    if run is not None:
        end_run(db, run["id"], "canceled", "client", None, now)


def check_current(run: sqlite3.Row, attempt: int, *, is_repeated: bool) -> bool:
    """Whether the run is still to be ended; False when this was done before.

    Args:
        is_repeated: The run has been ended in just the way that is asked for.

    Raises:
        FencedError: `attempt` is not the job's newest, or its run was ended in another way.
    """
    if run["attempt"] == run["job_attempts"] == attempt:
        if run["status"] == "in_progress":
            return True
        if is_repeated:
            return False
    raise _fenced(run, attempt)


def _fenced(run: sqlite3.Row, attempt: int) -> FencedError:
    return FencedError(
        f"attempt {attempt} (run {run['id']}) is no longer the current one of job "
        f"{run['job_id']}: that is attempt {run['job_attempts']}, job {run['job_status']}, run "
        f"{run['status']}"
    )


def renew_lease(
    db: sqlite3.Connection, worker: sqlite3.Row, run: sqlite3.Row, expires_at: int, now: int
) -> bool:
    """Renew, or win back, the lease of a worker's run; False when the run is no longer its own."""
    is_mine = run["worker_id"] == worker["id"] and run["attempt"] == run["job_attempts"]
    if not is_mine:
        return False
    if run["status"] == "in_progress":
        db.execute("UPDATE runs SET lease_expires_at = ? WHERE id = ?", (expires_at, run["id"]))
        return True
    is_untaken = run["ended_by"] == "lease" and run["job_status"] == "pending"
    if not is_untaken or worker["status"] == "terminated" or held_run(db, worker["id"]):
        return False
    db.execute(
        "UPDATE runs SET status = 'in_progress', ended_by = NULL, error = NULL, ended_at = NULL, "
        "lease_expires_at = ? WHERE id = ?",
        (expires_at, run["id"]),
    )
    db.execute(
        "UPDATE jobs SET status = 'in_progress', worker_id = ?, lost_runs = lost_runs - 1, "
        "updated_at = ? WHERE id = ?",
        (worker["id"], now, run["job_id"]),
    )
    return True


# Two clocks of one machine part by less than this between two heartbeats.
_DRIFT_S = 2.0


@dataclass(frozen=True, slots=True)
class RunClock:
    """What two clocks said at the last heartbeat of a run.

    Attributes:
        wall: The one that records are dated with, in microseconds: somebody may set it, and it
            goes on while the machine sleeps.
        steady: The one that does neither, in seconds.
        skipped: By how many microseconds `wall` has been set, forwards or backwards, so far.
        was_set: Whether it was since the heartbeat before.
    """

    wall: int
    steady: float
    skipped: int = 0
    was_set: bool = False

    def after(self, wall: int, steady: float) -> RunClock:
        """At the next heartbeat."""
        ahead_s = (wall - self.wall) / 1_000_000 - (steady - self.steady)
        was_set = abs(ahead_s) > _DRIFT_S
        skipped = self.skipped + (round(ahead_s * 1_000_000) if was_set else 0)
        return RunClock(wall, steady, skipped, was_set)


def instruction(
    worker: sqlite3.Row, run: sqlite3.Row | None, now: int, skipped: int = 0
) -> Instruction:
    """What a worker has to do about a run that is its own.

    Args:
        skipped: Microseconds by which the clock was set while the run went on.
    """
    if run is not None and run["job_status"] == "canceled":
        return "cancel"
    if run is not None and _is_overdue(run, now, skipped):
        return "timeout"
    if run is not None and _has_lasted(
        run["quiet_since"] or run["created_at"], run["stall_timeout_s"], now
    ):
        return "stalled"
    return "shutdown" if worker["status"] in ("shutdown", "terminated") else "continue"


def _is_overdue(run: sqlite3.Row, now: int, skipped: int) -> bool:
    has_passed = run["timeout_at"] is not None and run["timeout_at"] <= now
    return has_passed or _has_lasted(run["created_at"], run["max_duration_s"], now - skipped)


def _has_lasted(since: int, seconds: float | None, now: int) -> bool:
    return seconds is not None and now - since >= seconds * 1_000_000


def listen(db: sqlite3.Connection, run: sqlite3.Row, log_bytes: int, now: int) -> sqlite3.Row:
    """Note whether a run has logged anything since this was last asked; returns it anew."""
    query = "SELECT max(id) FROM events WHERE run_id = ?"
    heard = log_bytes + (db.execute(query, (run["id"],)).fetchone()[0] or 0)
    if heard == run["heard"]:
        return run
    db.execute("UPDATE runs SET heard = ? WHERE id = ?", (heard, run["id"]))
    note_sign_of_life(db, run["id"], now)
    return run_with_job(db, run["id"])


def note_sign_of_life(db: sqlite3.Connection, run_id: int, now: int) -> None:
    """From now on the run counts as quiet anew."""
    db.execute("UPDATE runs SET quiet_since = ? WHERE id = ?", (now, run_id))


def latest_of_run(
    db: sqlite3.Connection, run_id: int, keys: Iterable[str] | None = None
) -> dict[str, Any]:
    """Last value of each key over the events of a run; of all keys when `keys` is None."""
    wanted = None if keys is None else set(keys)
    found: dict[str, Any] = {}
    query = "SELECT data FROM events WHERE run_id = ? ORDER BY id DESC"
    # From the newest backwards: what is found first counts, and a short list of keys ends early.
    for (text,) in db.execute(query, (run_id,)):
        if wanted is not None and not wanted:
            break
        for key, value in json.loads(text).items():
            if key not in found and (wanted is None or key in wanted):
                found[key] = value
                if wanted is not None:
                    wanted.discard(key)
    return found
