"""What version 1.0.0 made goes on: a store of this machine, and a project with its functions.

`version_1/store.sql` is SQLite's dump of a store; `version_1/project.sql.gz` are all steps and
functions of a project, and what was written down of them, with the comments left out.
"""

from __future__ import annotations

import gzip
import io
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from openweights.backends.base import Backend
from openweights.backends.local.backend import LocalBackend
from openweights.backends.local.migrations import MIGRATIONS, migrate
from openweights.backends.supabase.backend import SupabaseBackend
from openweights.backends.supabase.sql import apply
from openweights.types import Retry, WorkerSpec
from tests.backends.steps import claim, draft, spec
from tests.backends.supabase.sql_calls import Caller, job, sign_up
from tests.backends.supabase.sql_world import event
from tests.supabase_double.postgres import PostgresServer
from tests.supabase_double.server import ANON_KEY

VERSION_1 = Path(__file__).parent / "version_1"
TRAINED_ON, CHECKPOINT = "conversations:file-444caa5e4d40", "checkpoint:file-fe703522f8b1"
CONTENTS = {TRAINED_ON: b'{"text": "hello"}\n', CHECKPOINT: b"checkpoint at step 4"}


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """A store whose worker ran a job when the machine went down."""
    home = tmp_path / "home"
    for folder in ("logs", "workers"):
        (home / folder).mkdir(parents=True)
    with closing(sqlite3.connect(home / "openweights.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript((VERSION_1 / "store.sql").read_text())
    for file_id, content in CONTENTS.items():
        path = home / "files" / file_id.split("-")[1][:2] / file_id.replace(":", "_")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    (home / "logs" / "1.log").write_bytes(b"boom\n")
    (home / "logs" / "2.log").write_bytes(b"step 4\n")
    return home


def work_off(backend: Backend, worker_id: str) -> list[str]:
    """Ids of the jobs in the order in which a new worker takes and completes them."""
    taken: list[str] = []
    while (claim := backend.claim_job(worker_id)) is not None:
        taken.append(claim.job.id)
        backend.append_events(claim.run.id, [draft(step=5)])
        backend.finish_run(claim.run.id, claim.run.attempt, "completed", exit_code=0)
    return taken


def use_the_queue(backend: Backend, old: str) -> None:
    """All that the queue has learned since version 1, on a store that was made before it.

    Args:
        old: A job of then that has completed.
    """
    backend.register_worker(WorkerSpec("w-queue"))
    assert backend.set_paused(True).paused_at is not None
    retry, later = Retry(1, 0.0, ("exit:3",)), backend.now() + timedelta(days=1)
    backend.submit_job(spec("q-first", after=(old,), retry=retry, priority=9, max_duration_s=60))
    backend.submit_job(spec("q-second", after=("q-first",), stall_timeout_s=60))
    backend.submit_job(spec("q-later", not_before=later))
    labeled = {"label": "gpu", "max_running": 1}
    backend.submit_job(spec("q-one", **labeled))
    assert backend.claim_job("w-queue") is None, "it is paused"
    backend.set_paused(False)
    assert backend.set_max_duration(3600).max_duration_s == 3600
    first = claim(backend, "w-queue")
    assert first.job.id == "q-first"
    again = backend.finish_run(first.run.id, 1, "failed", exit_code=3, cause="oom")
    assert (again.status, again.retries) == ("pending", 1)
    first = claim(backend, "w-queue")
    backend.finish_run(first.run.id, 2, "failed", exit_code=3)
    assert backend.get_job("q-second").failed_by == "q-first"
    backend.restart_job("q-first")
    assert work_off(backend, "w-queue")[0] == "q-first"
    assert backend.get_job("q-second").status == "completed"
    backend.submit_job(spec("q-one-more", **labeled))
    held = claim(backend, "w-queue")
    backend.touch_run(held.run.id)
    assert backend.heartbeat("w-queue", held.run.id) == "continue"
    backend.submit_job(spec("q-one-too-many", **labeled))
    backend.register_worker(WorkerSpec("w-beside"))
    assert backend.claim_job("w-beside") is None, "one with that label runs"
    backend.release_run(held.run.id, 1, reason="hung", is_lost=True)
    assert set(work_off(backend, "w-beside")) == {"q-one-more", "q-one-too-many"}
    assert backend.get_job("q-later").status == "pending"
    backend.cancel_job("q-later")
    assert backend.list_audit(target="q-first")[0].action == "job.restart"


@pytest.mark.parametrize("version", range(2, len(MIGRATIONS) + 1))
def test_a_store_of_each_schema_since_then_goes_on(old_home: Path, version: int) -> None:
    """One that a version in between has migrated, and that is used by this one."""
    with closing(sqlite3.connect(old_home / "openweights.db", isolation_level=None)) as db:
        migrate(db, MIGRATIONS[:version])
    with closing(LocalBackend(old_home)) as backend:
        backend.register_worker(WorkerSpec("w-new"))
        assert work_off(backend, "w-new") == ["running", "waiting"]
        use_the_queue(backend, "waiting")


# How a run ended -> whether its worker gave it back, which the end of a text once told.
ENDS = {
    ("failed", "release", "its worker was shut down, not counted"): True,
    ("failed", "release", "stopped: it hung"): False,
    ("failed", "finish", "exit code 1: lines, not counted"): False,
    ("canceled", "release", "its worker was shut down, not counted"): False,
}


def test_runs_that_a_version_before_has_given_back(old_home: Path) -> None:
    version = next(at for at, step in enumerate(MIGRATIONS) if "is_given_back" in step[0])
    with closing(sqlite3.connect(old_home / "openweights.db", isolation_level=None)) as db:
        migrate(db, MIGRATIONS[:version])
        for attempt, end in enumerate(ENDS, start=11):
            query = (
                "INSERT INTO runs (job_id, attempt, status, ended_by, error, created_at) "
                "VALUES ('failed', ?, ?, ?, ?, 0)"
            )
            db.execute(query, (attempt, *end))
    with closing(LocalBackend(old_home)) as backend:
        runs = backend.list_runs(job_id="failed")[-len(ENDS) :]
        assert [run.is_given_back for run in runs] == [*ENDS.values()]


def test_a_store_of_version_1_opens_migrates_and_goes_on(old_home: Path) -> None:
    with closing(LocalBackend(old_home)) as backend:
        statuses = {job.id: job.status for job in backend.list_jobs()}
        assert statuses == {
            "failed": "failed",
            "running": "in_progress",
            "waiting": "pending",
            "canceled": "canceled",
            "script": "in_progress",
        }
        (failed,) = backend.list_runs(job_id="failed")
        assert (failed.error, failed.exit_code) == ("exit code 3: boom", None)
        assert backend.read_log(failed.id) == b"boom\n"
        for file_id, content in CONTENTS.items():
            with backend.open_file(file_id) as stored:
                assert stored.read() == content
        (saved,) = backend.list_events(job_id="running", type="checkpoint")
        assert saved.data["file"] == CHECKPOINT
        backend.register_worker(WorkerSpec("w-new"))
        assert work_off(backend, "w-new") == ["running", "waiting"]
        assert [run.status for run in backend.list_runs(job_id="running")] == [
            "failed",
            "completed",
        ]
        assert backend.latest_values(job_id="running")["step"] == 5
        assert backend.restart_job("failed").status == "pending"
        assert backend.restart_job("canceled").status == "pending"
        assert set(work_off(backend, "w-new")) == {"failed", "canceled"}
        assert backend.collect_garbage(0).files == 0, "its jobs have only just ended"
        for name in statuses:
            if name != "script":
                backend.delete_job(name)
        assert backend.collect_garbage(0).files == 2
    with closing(LocalBackend(old_home)) as again:
        assert [job.id for job in again.list_jobs()] == ["script"]


def old_project(postgres: PostgresServer) -> str:
    url = postgres.create()
    with gzip.open(VERSION_1 / "project.sql.gz", "rt") as text, psycopg.connect(url) as db:
        db.execute(text.read().encode())
    return url


def test_a_project_of_version_1_is_brought_up_to_date_and_goes_on(
    postgres: PostgresServer, double: str
) -> None:
    url = old_project(postgres)
    key = sign_up(url)
    with closing(Caller(url, key)) as old:
        old.rpc("register_worker", worker={"id": "w-old"})
        for name, priority in (("failed", 2), ("running", 1), ("waiting", 0)):
            old.rpc("submit_job", spec=job(name, priority=priority))
        run = old.rpc("claim_job", worker_id="w-old")["run"]["id"]
        old.rpc("finish_run", run_id=run, attempt=1, status="failed", error="exit code 3: boom")
        run = old.rpc("claim_job", worker_id="w-old")["run"]["id"]
        old.rpc("append_events", run_id=run, events=[event("k", step=4)])
        old.rpc("append_log", run_id=run, offset=0, data="aGk=")
    with psycopg.connect(url) as db:
        query = (
            "INSERT INTO runs (organization_id, job_id, attempt, status, ended_by, error) "
            "SELECT id, 'failed', %s, %s, %s, %s FROM organizations"
        )
        ends = [(-attempt, *end) for attempt, end in enumerate(ENDS, start=1)]
        db.cursor().executemany(query, ends)
    name = conninfo_to_dict(url)["dbname"]
    with closing(SupabaseBackend(f"{double}/{name}", ANON_KEY, key)) as backend:
        assert len(backend.list_runs()) == 2 + len(ENDS), "read as far as it goes"
    assert apply.check(url), "it is not that of this version"
    outcome = apply.init(url)
    assert outcome.steps and outcome.differences == [] == apply.check(url)
    assert apply.init(url).steps == []
    with closing(SupabaseBackend(f"{double}/{name}", ANON_KEY, key)) as backend:
        assert {job.id: job.status for job in backend.list_jobs()} == {
            "failed": "failed",
            "running": "in_progress",
            "waiting": "pending",
        }
        # Its worker, of the version before, is still at work, and is told what it knows.
        assert backend.heartbeat("w-old", run) == "continue"
        assert backend.read_log(run) == b"hi"
        backend.append_log(run, 2, b" there")
        assert backend.finish_run(run, 1, "completed").outputs == {"step": 4}
        failed, *ended = backend.list_runs(job_id="failed")
        assert (failed.error, failed.is_given_back) == ("exit code 3: boom", False)
        assert [run.is_given_back for run in ended] == [*ENDS.values()]
        assert backend.restart_job("failed").status == "pending"
        backend.register_worker(WorkerSpec("w-new"))
        assert work_off(backend, "w-new") == ["failed", "waiting"]
        file = backend.put_file(io.BytesIO(b"new"), "result", "f")
        assert backend.submit_job(spec("next", params={"mounted_files": {"f": file.id}}))
        assert work_off(backend, "w-new") == ["next"]
        assert backend.sizes().file_bytes == 3
        use_the_queue(backend, "waiting")
