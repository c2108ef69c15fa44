"""What nobody needs any more: deleted jobs, and by age files, checkpoints and logs."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openweights.backends.local.failures import clear_errors
from openweights.backends.local.store import Store, find, note
from openweights.backends.values import LEAST_LOG_BYTES, checked_keep_s, removed_log
from openweights.errors import InvalidStateError
from openweights.types import Garbage, Sizes

_FILE_ID = re.compile(r"[A-Za-z0-9_-]+:file-[0-9a-f]{12}")
_CHECKPOINT = "checkpoint:"
_NAMING = ("params", "script", "model", "bundle_file", "after")
_OPEN = "SELECT job_id FROM runs WHERE status = 'in_progress'"


@dataclass(slots=True)
class Keeper:
    """A job, as far as it keeps files.

    Attributes:
        text: What was submitted, in which it names files and other jobs.
        is_active: It waits or runs, or its worker has not stopped it yet.
        changed_at: In microseconds.
        results: Files that its events name.
        resumable: Those of them that only its next attempt would read.
    """

    id: str
    text: str
    is_active: bool
    changed_at: int
    results: set[str] = field(default_factory=set[str])
    resumable: set[str] = field(default_factory=set[str])


def named_files(keepers: Sequence[Keeper], before: int) -> set[str]:
    """Files that must stay: all that a job names, but for the checkpoints of jobs that ended before
    that moment and that no job names which waits or runs.
    """
    active = "\n".join(keeper.text for keeper in keepers if keeper.is_active)
    named: set[str] = set()
    for keeper in keepers:
        named |= {*_FILE_ID.findall(keeper.text)} | keeper.results
        is_over = keeper.changed_at < before and keeper.id not in active
        if keeper.is_active or not is_over:
            named |= keeper.resumable
    return named


class RetentionVerbs(Store):
    """The part of `Backend` about what is removed."""

    def delete_job(self, job_id: str) -> None:
        with self._write() as db:
            job = find(db, "jobs", job_id)
            if job is None:
                return
            _check_deletable(job_id, job["status"], _keepers(db))
            runs = [id for (id,) in db.execute("SELECT id FROM runs WHERE job_id = ?", (job_id,))]
            # Numbers of runs never come again: a worker that was away may still hold one.
            db.execute("UPDATE last_run SET id = max(id, (SELECT coalesce(max(id), 0) FROM runs))")
            of_job = "run_id IN (SELECT id FROM runs WHERE job_id = ?)"
            db.execute(f"DELETE FROM events WHERE {of_job}", (job_id,))
            db.execute("DELETE FROM runs WHERE job_id = ?", (job_id,))
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            note(db, "job.delete", job_id, self._now())
        with clear_errors(self.home):
            for run_id in runs:
                self._logs.remove(run_id)

    def collect_garbage(self, keep_s: float, *, dry_run: bool = False) -> Garbage:
        before = self._now() - int(checked_keep_s(keep_s) * 1_000_000)
        with clear_errors(self.home):
            contents = self._files.contents()
        with self._write() as db:
            files = [*_unnamed(db, before), *_unrecorded(db, contents)]
            if not dry_run:
                db.executemany("DELETE FROM files WHERE id = ?", [(id,) for id, _ in files])
            logs = self._old_logs(db, before)
            if not dry_run and (files or logs):
                note(db, "store.gc", None, self._now(), files=len(files), logs=len(logs))
        if not dry_run:
            self._remove_contents(id for id, _ in files)
            with clear_errors(self.home):
                for run_id in logs:
                    self._logs.replace(run_id, removed_log(logs[run_id]))
        sizes = sum(size for _, size in files)
        return Garbage(len(files), sizes, len(logs), sum(logs.values()))

    def _remove_contents(self, file_ids: Iterable[str]) -> None:
        # After the records, so that a crash in between leaves no record of nothing; and under the
        # write lock again, because the same content may have come back since.
        for file_id in file_ids:
            with self._write() as db:
                row = db.execute("SELECT 1 FROM files WHERE id = ?", (file_id,)).fetchone()
                if row is None:
                    self._files.remove(file_id)

    def _old_logs(self, db: sqlite3.Connection, before: int) -> dict[int, int]:
        """Run -> bytes of its log, of runs that ended before that moment."""
        rows = db.execute("SELECT id FROM runs WHERE ended_at < ?", (before,)).fetchall()
        sizes = {row["id"]: self._logs.size(row["id"]) for row in rows}
        return {run_id: size for run_id, size in sizes.items() if size > LEAST_LOG_BYTES}

    def sizes(self) -> Sizes:
        with self._read() as db:
            (files,) = db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
        with clear_errors(self.home):
            database = sum(_size(path) for path in self.home.glob("openweights.db*"))
            return Sizes(files, self._logs.total(), database)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _keepers(db: sqlite3.Connection) -> list[Keeper]:
    open_jobs = {job_id for (job_id,) in db.execute(_OPEN)}
    keepers: dict[str, Keeper] = {}
    for row in db.execute("SELECT * FROM jobs"):
        text = " ".join(str(row[name]) for name in _NAMING)
        is_active = row["status"] in ("pending", "in_progress") or row["id"] in open_jobs
        keepers[row["id"]] = Keeper(row["id"], text, is_active, row["updated_at"])
    events = (
        "SELECT runs.job_id, events.data FROM events JOIN runs ON runs.id = events.run_id "
        "WHERE events.data LIKE '%:file-%'"
    )
    for job_id, text in db.execute(events):
        keeper = keepers[job_id]
        is_kept = json.loads(text).get("kept")
        for file_id in _FILE_ID.findall(text):
            is_resumable = file_id.startswith(_CHECKPOINT) and not is_kept
            (keeper.resumable if is_resumable else keeper.results).add(file_id)
    return list(keepers.values())


def _unnamed(db: sqlite3.Connection, before: int) -> list[tuple[str, int]]:
    """Id and size of each file that was put before that moment and may go."""
    named = named_files(_keepers(db), before)
    old = "SELECT id, bytes FROM files WHERE max(used_at, created_at) < ?"
    return [(id, size) for id, size in db.execute(old, (before,)) if id not in named]


def _unrecorded(db: sqlite3.Connection, contents: Mapping[str, int]) -> list[tuple[str, int]]:
    """What a killed process has left: content comes before its record, and goes after it."""
    recorded = {id for (id,) in db.execute("SELECT id FROM files")}
    return [(id, size) for id, size in contents.items() if id not in recorded]


def _check_deletable(job_id: str, status: str, keepers: Sequence[Keeper]) -> None:
    for keeper in keepers:
        if keeper.id == job_id and keeper.is_active:
            remedy = "cancel it first"
            if status == "canceled":
                remedy = "its worker is still stopping it; try again in a moment"
            raise InvalidStateError(f"job {job_id} is {status}: {remedy}")
        if keeper.is_active and job_id in keeper.text:
            raise InvalidStateError(
                f"job {job_id} is named by job {keeper.id}, which has not ended: wait for that one"
            )
