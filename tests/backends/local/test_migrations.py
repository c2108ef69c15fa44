"""Migrations are applied completely or not at all, once, and never backwards."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from openweights.backends.local.backend import LocalBackend
from openweights.backends.local.migrations import MIGRATIONS, migrate, schema_version
from openweights.errors import ConfigurationError
from openweights.types import WorkerSpec

_ONE = ("CREATE TABLE a (x INTEGER)",)
_TWO = ("CREATE TABLE b (x INTEGER)", "INSERT INTO a VALUES (1)")
_BROKEN = ("CREATE TABLE c (x INTEGER)", "INSERT INTO nowhere VALUES (1)")


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_only_missing_steps_are_applied(tmp_path: Path) -> None:
    db = _open(tmp_path / "db")
    migrate(db, (_ONE,))
    assert (_tables(db), schema_version(db)) == ({"a"}, 1)
    for _ in range(2):
        migrate(db, (_ONE, _TWO))
    assert (_tables(db), schema_version(db)) == ({"a", "b"}, 2)
    assert db.execute("SELECT count(*) FROM a").fetchone() == (1,)
    with pytest.raises(ConfigurationError, match="newer openweights.*2.*upgrade"):
        migrate(db, (_ONE,))
    db.close()


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    db = _open(tmp_path / "db")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        migrate(db, (_ONE, _BROKEN))
    assert (_tables(db), schema_version(db), db.in_transaction) == (set(), 0, False)
    migrate(db, (_ONE,))
    assert _tables(db) == {"a"}
    db.close()


def test_many_at_once_apply_each_step_once(tmp_path: Path) -> None:
    connections = [_open(tmp_path / "db") for _ in range(8)]
    barrier = threading.Barrier(8)
    failures: list[Exception] = []

    def run(db: sqlite3.Connection) -> None:
        barrier.wait()
        try:
            migrate(db, (_ONE, _TWO))
        except sqlite3.Error as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(db,)) for db in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert connections[0].execute("SELECT count(*) FROM a").fetchone() == (1,)
    for db in connections:
        db.close()


def test_the_schema_itself_forbids_what_the_life_cycle_forbids(tmp_path: Path) -> None:
    db = _open(tmp_path / "db")
    migrate(db)
    assert schema_version(db) == len(MIGRATIONS)
    legal = {
        ("pending", "in_progress"),
        ("pending", "canceled"),
        ("in_progress", "pending"),
        ("in_progress", "completed"),
        ("in_progress", "failed"),
        ("in_progress", "canceled"),
        ("failed", "pending"),
        ("canceled", "pending"),
    }
    statuses = ("pending", "in_progress", "completed", "failed", "canceled")
    columns = (
        "id, type, script, params, docker_image, requires_vram_gb, priority, max_attempts, "
        "created_at, updated_at, status"
    )
    for old in statuses:
        for new in statuses:
            values = (f"{old}-{new}", "custom", "", "{}", "", 0, 0, 3, 0, 0, old)
            db.execute(f"INSERT INTO jobs ({columns}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", values)
            change = ("UPDATE jobs SET status = ? WHERE id = ?", (new, values[0]))
            if new == old or (old, new) in legal:
                db.execute(*change)
            else:
                with pytest.raises(sqlite3.IntegrityError, match="life cycle"):
                    db.execute(*change)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        db.execute(f"INSERT INTO jobs ({columns}) VALUES ('x','','','','',0,0,0,0,0,'done')")
    db.close()


def test_events_of_a_type_are_found_by_their_index(tmp_path: Path) -> None:
    db = _open(tmp_path / "db")
    migrate(db)
    query = "SELECT * FROM events WHERE run_id = 1{} AND id > 0 ORDER BY id LIMIT 10"

    def plan(condition: str) -> str:
        rows = db.execute("EXPLAIN QUERY PLAN " + query.format(condition))
        return " ".join(str(row[-1]) for row in rows)

    assert "events_of_type" in plan(" AND json_extract(data, '$.type') = 'checkpoint'")
    assert "TEMP B-TREE" not in plan(" AND json_extract(data, '$.type') = 'checkpoint'")
    assert "events_of_run" in plan(""), "the control"
    db.close()


def test_a_store_of_the_first_version_opens_and_goes_on(tmp_path: Path) -> None:
    """A job that ran, one that was running, and one that waits, as version 1.0.0 left them."""
    home = tmp_path / "home"
    home.mkdir()
    db = _open(home / "openweights.db")
    db.execute("PRAGMA journal_mode = WAL")
    migrate(db, MIGRATIONS[:1])
    job = (
        "INSERT INTO jobs (id, type, script, params, docker_image, requires_vram_gb, priority, "
        "max_attempts, created_at, updated_at, status, attempts, worker_id) "
        "VALUES (?, 'custom', 'true', '{}', '', 0, 0, 3, 1767323045678901, 1767323045678901, "
        "?, ?, ?)"
    )
    run = (
        "INSERT INTO runs (job_id, worker_id, attempt, status, ended_by, error, lease_expires_at, "
        "created_at) VALUES (?, 'w-old', 1, ?, ?, ?, ?, 1767323045678901)"
    )
    db.execute(job, ("done", "failed", 1, None))
    db.execute(job, ("running", "in_progress", 1, "w-old"))
    db.execute(job, ("waiting", "pending", 0, None))
    db.execute(run, ("done", "failed", "finish", "exit code 3: boom", None))
    db.execute(run, ("running", "in_progress", None, None, 1767323105678901))
    data = '{"type": "checkpoint", "step": 4, "file": "checkpoint:file-000000000000"}'
    db.execute(
        "INSERT INTO events (run_id, key, data, created_at) VALUES (2, 'k', ?, 1767323045678901)",
        (data,),
    )
    db.execute(
        "INSERT INTO workers (id, docker_image, hardware_type, gpu_count, vram_gb, cached_models, "
        "status, incarnation, created_at, pinged_at) "
        "VALUES ('w-old', '', 'cpu', 0, 0, '[]', 'active', 'x', 1767323045678901, 1767323045678901)"
    )
    db.close()
    with closing(LocalBackend(home)) as backend:
        old = backend.list_runs(job_id="done")[0]
        assert (old.status, old.error, old.exit_code) == ("failed", "exit code 3: boom", None)
        backend.register_worker(WorkerSpec("w-new"))
        order: list[str] = []
        while (claim := backend.claim_job("w-new")) is not None:
            order.append(claim.job.id)
            backend.finish_run(claim.run.id, claim.run.attempt, "completed", exit_code=0)
        assert order == ["running", "waiting"], "its worker is gone, and it goes on first"
        assert [run.exit_code for run in backend.list_runs(job_id="running")] == [None, 0]
        (event,) = backend.list_events(job_id="running", type="checkpoint")
        assert event.data["step"] == 4
        assert backend.restart_job("done").status == "pending"
