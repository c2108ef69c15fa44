"""What all verbs of the store on this machine stand on: its folder, connections and rows."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import pwd
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openweights.backends.local import lifecycle, records
from openweights.backends.local.connections import Connections
from openweights.backends.local.failures import clear_errors
from openweights.backends.local.folders import FileFolder, LogFolder
from openweights.backends.local.migrations import migrate
from openweights.backends.local.worker_locks import WorkerLocks
from openweights.backends.values import LOG_LIMIT_BYTES
from openweights.errors import ConfigurationError, NotFoundError, shown
from openweights.types import Claim, JobRecord, Lane, RunRecord

_BUSY_TIMEOUT_S = 30.0
RUNS = "runs"  # below the home: a folder for each run, made and locked by its worker


_LAST_RUN = "SELECT max(last_run.id, (SELECT coalesce(max(id), 0) FROM runs)) FROM last_run"
logger = logging.getLogger(__name__)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Store:
    """An open store.

    Args:
        home: Folder of the store.
        lane: Which jobs workers of this object take; None for all.
        clock: Tells the time that leases and timeouts are measured with.
        steady: Seconds that go on whatever the clock is set to, and stand still while the machine
            sleeps.
    """

    def __init__(
        self,
        home: Path,
        *,
        lease_s: float = 60.0,
        heartbeat_s: float = 1.0,
        log_limit_bytes: int = LOG_LIMIT_BYTES,
        organization_id: str = "local",
        lane: Lane | None = None,
        clock: Callable[[], datetime] = utc_now,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.home = home
        self.lease_s = lease_s
        self.heartbeat_s = heartbeat_s
        self.log_limit_bytes = log_limit_bytes
        self.organization_id = organization_id
        self.pace_s = 0.0
        self.team = None
        self._lane: Lane | None = lane
        self._clock = clock
        self._steady = steady
        self._run_clocks: dict[
            str, tuple[int, lifecycle.RunClock]
        ] = {}  # by worker: its run, and the clock
        self._path = home / "openweights.db"
        self._connections = Connections(self._path, self._connect)
        self._files = FileFolder(home / "files", organization_id)
        self._logs = LogFolder(home / "logs")
        self._locks = WorkerLocks(home / "workers")

    @property
    def liveness_fds(self) -> tuple[int, ...]:
        return self._locks.fds

    def now(self) -> datetime:
        return self._clock()

    def close(self) -> None:
        self._connections.close()
        self._locks.close()

    def _now(self) -> int:
        return records.to_micros(self._clock())

    @contextmanager
    def _read(self) -> Generator[sqlite3.Connection, None, None]:
        with clear_errors(self.home), self._connections.use() as db:
            yield db

    @contextmanager
    def _write(self) -> Generator[sqlite3.Connection, None, None]:
        with clear_errors(self.home), self._connections.write() as db:
            yield db

    def _job(self, db: sqlite3.Connection, job_id: str) -> JobRecord:
        row = find(db, "jobs", job_id)
        if row is None:
            raise NotFoundError(f"no job {shown(job_id)} in the store in {self.home}")
        return records.job_record(row, self.organization_id)

    def _run(self, row: sqlite3.Row) -> RunRecord:
        return records.run_record(row, self._logs.size(row["id"]))

    def _worker(self, db: sqlite3.Connection, worker_id: str) -> sqlite3.Row:
        row = find(db, "workers", worker_id)
        if row is None:
            raise NotFoundError(f"no worker {shown(worker_id)} in the store in {self.home}")
        return row

    def _check_exists(
        self, db: sqlite3.Connection, *, job_id: str | None, worker_id: str | None
    ) -> None:
        if job_id is not None:
            self._job(db, job_id)
        if worker_id is not None:
            self._worker(db, worker_id)

    def _insert_job(self, db: sqlite3.Connection, columns: Mapping[str, Any], now: int) -> None:
        insert(db, "jobs", {**columns, "status": "pending", "created_at": now, "updated_at": now})

    def _start(
        self,
        db: sqlite3.Connection,
        job: sqlite3.Row,
        worker_id: str | None,
        lease_expires_at: int | None,
        now: int,
    ) -> Claim:
        new_job, new_run = lifecycle.start_run(db, job, worker_id, lease_expires_at, now)
        return Claim(
            records.job_record({**dict(job), **new_job}, self.organization_id),
            records.run_record(new_run, 0),
        )

    def _connect(self) -> sqlite3.Connection:
        for folder in (self.home, *(self.home / name for name in ("files", "logs", "workers"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_private()
        db = sqlite3.connect(
            self._path,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            db.row_factory = sqlite3.Row
            # In WAL mode this can lose the last moments in a power cut, never consistency.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            # Four times the default: the same few pages change at every claim, and moving them
            # into the database costs two waits for the disk.
            db.execute("PRAGMA wal_autocheckpoint = 4000")
            if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                self._switch_to_wal(db)
            migrate(db)
            self._check_complete(db)
        except BaseException:
            db.close()
            raise
        return db

    def _make_private(self) -> None:
        """A new store is its owner's alone, whoever has made its folder, and with whatever umask:
        who writes to it has code run.
        """
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self.home.chmod(0o700)

    def _check_complete(self, db: sqlite3.Connection) -> None:
        """Tell of runs that have a log and no record: what was written last has been lost, as when
        the `-wal` file is deleted. Their numbers are not given out again, for their logs are there.
        """
        newest = self._logs.newest()
        with closing(db.execute(_LAST_RUN)) as rows:
            (last,) = rows.fetchone()
        if newest > last:
            logger.warning(
                "the store in %s has lost records: of run %d there is a log, and the last run that "
                "is known is %d. Was openweights.db-wal deleted, or an older copy put back?",
                *(self.home, newest, last),
            )
            db.execute("UPDATE last_run SET id = max(id, ?)", (newest,))

    def _switch_to_wal(self, db: sqlite3.Connection) -> None:
        # SQLite does not wait when two processes switch at once, so they take turns here.
        fd = os.open(self.home, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        finally:
            os.close(fd)
        if mode != "wal":
            raise ConfigurationError(
                f"the file system of {self.home} cannot hold the store (SQLite's WAL mode does not "
                "work on network drives): set OPENWEIGHTS_HOME to a folder on a local disk"
            )


def find(db: sqlite3.Connection, table: str, row_id: str) -> sqlite3.Row | None:
    return db.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,)).fetchone()


def insert(db: sqlite3.Connection, table: str, columns: Mapping[str, Any]) -> None:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(columns.values()))


def note(
    db: sqlite3.Connection, action: str, target: str | None, now: int, **details: object
) -> None:
    """Write down who did what."""
    given = {name: value for name, value in details.items() if value is not None}
    insert(
        db,
        "audit",
        {
            "created_at": now,
            "who": _user(),
            "action": action,
            "target": target,
            "details": json.dumps(given),
        },
    )


@functools.cache
def _user() -> str:
    """Who runs this process: the user's name, or the number of one without a name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def matching(query: str, conditions: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """Adds `name = ?` for each condition that is not None."""
    given = {name: value for name, value in conditions.items() if value is not None}
    if given:
        query += " WHERE " + " AND ".join(f"{name} = ?" for name in given)
    return query, tuple(given.values())
