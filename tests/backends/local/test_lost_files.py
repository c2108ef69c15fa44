"""Files of the store that vanish under it: said, not silent; and what was broken is left behind."""

from __future__ import annotations

import io
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from openweights.backends.local.backend import LocalBackend
from openweights.errors import StoreUnavailableError
from openweights.types import WorkerSpec
from tests.backends.steps import claim, spec


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def backend(home: Path) -> Iterator[LocalBackend]:
    with closing(LocalBackend(home)) as backend:
        yield backend


def _lose_log(home: Path) -> None:
    for name in ("openweights.db-wal", "openweights.db-shm"):
        (home / name).unlink()


def test_what_is_written_after_the_log_was_lost_is_seen_by_all(
    home: Path, backend: LocalBackend
) -> None:
    """An open connection would go on with the file that is no longer there."""
    backend.submit_job(spec("before"))
    _lose_log(home)
    backend.submit_job(spec("after"))
    with closing(LocalBackend(home)) as other:
        assert {job.id for job in other.list_jobs()} == {"before", "after"}
        other.submit_job(spec("of another"))
    assert {"after", "of another"} <= {job.id for job in backend.list_jobs()}
    with closing(sqlite3.connect(home / "openweights.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_lost_records_are_told_of_and_their_logs_are_not_written_over(
    home: Path, tmp_path: Path, backend: LocalBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(LocalBackend(home)) as first:
        first.submit_job(spec("kept"))  # closing writes it into the database
    backend.register_worker(WorkerSpec("w1"))
    lost = claim(backend)
    backend.append_log(lost.run.id, 0, b"a long log of old\n")
    later_home = tmp_path / "after the machine went down"
    shutil.copytree(home, later_home, ignore=shutil.ignore_patterns("*-wal", "*-shm", "*.lock"))
    caplog.set_level(logging.WARNING)
    with closing(LocalBackend(later_home)) as other:
        assert [job.status for job in other.list_jobs()] == ["pending"]
        (record,) = caplog.records
        assert "has lost records" in record.message and "openweights.db-wal" in record.message
        other.register_worker(WorkerSpec("w2"))
        again = claim(other, "w2")
        assert again.run.id > lost.run.id
        other.append_log(again.run.id, 0, b"new\n")
        assert other.read_log(again.run.id) == b"new\n"
    caplog.clear()
    with closing(LocalBackend(later_home)) as later:
        assert later.list_jobs() and not caplog.records, "once"


def test_a_connection_that_failed_is_not_used_again(home: Path, backend: LocalBackend) -> None:
    """An error of the disk may stay with a connection for ever."""
    backend.submit_job(spec())

    def used() -> sqlite3.Connection:
        with backend._connections.use() as db:  # noqa: SLF001 - nothing public shows which
            return db

    first = used()
    for code, is_kept in ((sqlite3.SQLITE_BUSY, True), (sqlite3.SQLITE_IOERR_READ, False)):
        error = sqlite3.OperationalError("by the test")
        error.sqlite_errorcode = code
        with pytest.raises(StoreUnavailableError), backend._read():  # noqa: SLF001
            raise error
        assert (used() is first) == is_kept
    assert backend.list_jobs() and backend.put_file(io.BytesIO(b"x"), "result", "f")


def test_content_that_a_killed_process_left_is_collected(home: Path, backend: LocalBackend) -> None:
    """Of one that removed a file, or put one: its record is gone, or was never there."""
    kept = backend.put_file(io.BytesIO(b"kept"), "custom_job_file", "f")
    lost = backend.put_file(io.BytesIO(b"lost"), "custom_job_file", "f")
    with closing(sqlite3.connect(home / "openweights.db")) as db, db:
        db.execute("DELETE FROM files WHERE id = ?", (lost.id,))
    planned = backend.collect_garbage(0, dry_run=True)
    assert (planned.files, planned.file_bytes) == (1, 4)
    assert backend.collect_garbage(0) == planned
    assert [path.read_bytes() for path in (home / "files").glob("??/*")] == [b"kept"]
    with backend.open_file(kept.id) as stored:
        assert stored.read() == b"kept"
    again = backend.put_file(io.BytesIO(b"lost"), "custom_job_file", "f")
    with backend.open_file(again.id) as stored:
        assert again.id == lost.id and stored.read() == b"lost"
