"""The schema of the SQLite store, as numbered steps that are never edited once released.

A database carries the number of its last step in `user_version`. Missing steps are applied in one
transaction, so that several processes may open a new or an old database at the same moment: one of
them migrates, the others wait and find nothing left to do.

The triggers repeat the life cycle of a job (see `openweights.types.JobStatus`), so that not even a
program other than this one can write a status that the state machine forbids.
"""

from __future__ import annotations

import sqlite3

from openweights.errors import ConfigurationError

Migration = tuple[str, ...]

_FIRST: Migration = (
    """
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        type TEXT NOT NULL,
        script TEXT NOT NULL,
        params TEXT NOT NULL,
        model TEXT,
        docker_image TEXT NOT NULL,
        requires_vram_gb INTEGER NOT NULL,
        allowed_hardware TEXT,
        bundle_file TEXT,
        priority INTEGER NOT NULL,
        max_attempts INTEGER NOT NULL,
        timeout_at INTEGER,
        status TEXT NOT NULL
            CHECK (status IN ('pending', 'in_progress', 'completed', 'failed', 'canceled')),
        attempts INTEGER NOT NULL DEFAULT 0,
        lost_runs INTEGER NOT NULL DEFAULT 0,
        outputs TEXT,
        worker_id TEXT,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL
    )
    """,
    # Holds only what waits, so that the cost of a claim does not grow with the history.
    "CREATE INDEX jobs_pending ON jobs (priority DESC, created_at) WHERE status = 'pending'",
    "CREATE INDEX jobs_listed ON jobs (status, updated_at)",
    """
    CREATE TRIGGER jobs_transition BEFORE UPDATE OF status ON jobs
    WHEN NOT (
        new.status = old.status
        OR (old.status = 'pending' AND new.status IN ('in_progress', 'canceled'))
        OR (old.status = 'in_progress' AND new.status != 'in_progress')
        OR (old.status IN ('failed', 'canceled') AND new.status = 'pending')
    )
    BEGIN
        SELECT RAISE(ABORT, 'the life cycle of a job forbids this change of its status');
    END
    """,
    """
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        worker_id TEXT,
        attempt INTEGER NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('in_progress', 'completed', 'failed', 'canceled')),
        ended_by TEXT CHECK (ended_by IN ('finish', 'release', 'lease', 'worker', 'client')),
        error TEXT,
        lease_expires_at INTEGER,
        created_at INTEGER NOT NULL,
        ended_at INTEGER,
        UNIQUE (job_id, attempt)
    )
    """,
    "CREATE UNIQUE INDEX runs_of_job ON runs (job_id) WHERE status = 'in_progress'",
    "CREATE UNIQUE INDEX runs_of_worker ON runs (worker_id) WHERE status = 'in_progress'",
    "CREATE INDEX runs_leased ON runs (lease_expires_at) WHERE status = 'in_progress'",
    """
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL REFERENCES runs (id),
        key TEXT NOT NULL,
        data TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        UNIQUE (run_id, key)
    )
    """,
    "CREATE INDEX events_of_run ON events (run_id, id)",
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        created_at INTEGER NOT NULL
    )
    """,
    "CREATE INDEX files_listed ON files (purpose, created_at)",
    """
    CREATE TABLE workers (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        docker_image TEXT NOT NULL,
        hardware_type TEXT NOT NULL,
        gpu_count INTEGER NOT NULL,
        vram_gb INTEGER NOT NULL,
        cloud_type TEXT,
        pod_id TEXT,
        cached_models TEXT NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('starting', 'active', 'shutdown', 'terminated')),
        incarnation TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        pinged_at INTEGER NOT NULL
    )
    """,
    "CREATE INDEX workers_silent ON workers (pinged_at) WHERE status != 'terminated'",
)

# Metrics have no type, so this stays small however long a run is.
_EVENTS_OF_TYPE: Migration = (
    """
    CREATE INDEX events_of_type ON events (run_id, json_extract(data, '$.type'), id)
    WHERE json_extract(data, '$.type') IS NOT NULL
    """,
)

# Steps only add: a worker of the version before may go on beside a client of this one.
_RELIABILITY: Migration = ("ALTER TABLE runs ADD COLUMN exit_code INTEGER",)

# A worker of the version before knows no `after`: a trigger keeps it from running a job early.
_DEPENDENCIES: Migration = (
    "ALTER TABLE jobs ADD COLUMN after TEXT",
    "ALTER TABLE jobs ADD COLUMN failed_by TEXT",
    "CREATE INDEX jobs_dependent ON jobs (status) WHERE after IS NOT NULL",
    "DROP TRIGGER jobs_transition",
    """
    CREATE TRIGGER jobs_transition BEFORE UPDATE OF status ON jobs
    WHEN NOT (
        new.status = old.status
        OR (old.status = 'pending' AND new.status IN ('in_progress', 'canceled'))
        OR (old.status = 'pending' AND new.status = 'failed' AND new.failed_by IS NOT NULL)
        OR (old.status = 'in_progress' AND new.status != 'in_progress')
        OR (old.status IN ('failed', 'canceled') AND new.status = 'pending')
    )
    BEGIN
        SELECT RAISE(ABORT, 'the life cycle of a job forbids this change of its status');
    END
    """,
    """
    CREATE TRIGGER jobs_in_turn BEFORE UPDATE OF status ON jobs
    WHEN new.status = 'in_progress' AND new.after IS NOT NULL AND EXISTS (
        SELECT 1 FROM json_each(new.after) JOIN jobs AS needed ON needed.id = value
        WHERE needed.status != 'completed'
    )
    BEGIN
        SELECT RAISE(ABORT, 'the job waits for others that have not completed');
    END
    """,
)

_RETENTION: Migration = (
    "ALTER TABLE files ADD COLUMN used_at INTEGER NOT NULL DEFAULT 0",  # when it was put last
    "ALTER TABLE runs ADD COLUMN event_bytes INTEGER NOT NULL DEFAULT 0",
    # The highest id of a run that was deleted: it never comes again.
    "CREATE TABLE last_run (id INTEGER NOT NULL)",
    "INSERT INTO last_run VALUES (0)",
)

_SCHEDULING: Migration = (
    "ALTER TABLE jobs ADD COLUMN not_before INTEGER",
    "ALTER TABLE jobs ADD COLUMN label TEXT",
    "ALTER TABLE jobs ADD COLUMN max_running INTEGER",
    "ALTER TABLE jobs ADD COLUMN max_duration_s REAL",
    "ALTER TABLE jobs ADD COLUMN stall_timeout_s REAL",
    "ALTER TABLE jobs ADD COLUMN retry TEXT",
    "ALTER TABLE jobs ADD COLUMN retries INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX jobs_labeled ON jobs (label) WHERE status = 'in_progress'",
    "ALTER TABLE runs ADD COLUMN cause TEXT",
    # How much a run had reported when that was last looked at, and since when it is not more.
    "ALTER TABLE runs ADD COLUMN heard INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE runs ADD COLUMN quiet_since INTEGER",
    "CREATE TABLE queue (id INTEGER PRIMARY KEY CHECK (id = 1), paused_at INTEGER, "
    "max_duration_s REAL)",
    "INSERT INTO queue (id) VALUES (1)",
)

_AUDIT: Migration = (
    "CREATE TABLE audit (id INTEGER PRIMARY KEY, created_at INTEGER NOT NULL, who TEXT NOT NULL, "
    "action TEXT NOT NULL, target TEXT, details TEXT NOT NULL)",
    "CREATE INDEX audit_of_target ON audit (target, id)",
)

# What was written down as the end of a text before.
_GIVEN_BACK: Migration = (
    "ALTER TABLE runs ADD COLUMN is_given_back INTEGER NOT NULL DEFAULT 0",
    "UPDATE runs SET is_given_back = 1 WHERE status = 'failed' AND ended_by = 'release' "
    "AND error LIKE '%, not counted'",
)

MIGRATIONS: tuple[Migration, ...] = (
    *(_FIRST, _EVENTS_OF_TYPE, _RELIABILITY),
    *(_DEPENDENCIES, _RETENTION, _SCHEDULING, _AUDIT, _GIVEN_BACK),
)


def schema_version(db: sqlite3.Connection) -> int:
    """How many steps the database has seen."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def migrate(db: sqlite3.Connection, migrations: tuple[Migration, ...] = MIGRATIONS) -> None:
    """Apply the steps that `db` lacks: all of them or none.

    Args:
        db: A connection in autocommit mode (`isolation_level=None`).

    Raises:
        ConfigurationError: The database was written by a newer version of this package.
    """
    if _is_current(db, migrations):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have migrated while this one waited for the lock.
        if not _is_current(db, migrations):
            for migration in migrations[schema_version(db) :]:
                for statement in migration:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(migrations)}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _is_current(db: sqlite3.Connection, migrations: tuple[Migration, ...]) -> bool:
    version = schema_version(db)
    if version > len(migrations):
        raise ConfigurationError(
            f"this store was written by a newer openweights (its schema is {version}, this version "
            f"knows {len(migrations)}): upgrade openweights, or set OPENWEIGHTS_HOME to another "
            "folder"
        )
    return version == len(migrations)
