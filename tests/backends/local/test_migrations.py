"""Migrations are applied completely or not at all, once, and never backwards."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from openweights.backends.local.migrations import MIGRATIONS, migrate, schema_version
from openweights.errors import ConfigurationError

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
