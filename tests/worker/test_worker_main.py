"""The loop: starting, going away when idle or told to, and what a shutdown does to the job."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.backends.local.migrations import MIGRATIONS
from openweights.errors import ConfigurationError, InvalidStateError
from openweights.settings import Settings
from openweights.worker.folder import marker_of
from openweights.worker.main import run_worker
from openweights.worker.process import marked_processes
from tests.waiting import HANGS_S, NEVER_S, remove_under_use, until_exists, wait_until
from tests.worker.harness import Jobs, Outage, WorkerThread

StartWorker = Callable[..., Any]

SAVING = """
save() { sleep 0.4; echo '{"key": "k", "created_at": "2026-01-01T00:00:00+00:00", "data": %s}' \
  > $OPENWEIGHTS_SPOOL/$OPENWEIGHTS_RUN_ID-1-01234567.jsonl; exit 143; }
test -e %s && exit 0
trap save TERM; echo up; while :; do sleep 0.05; done
"""


def test_an_embedded_worker_is_alone_and_goes_away_when_idle(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, tmp_path: Path
) -> None:
    job = jobs.submit(until_exists(tmp_path / "go"))
    first = start_worker("--embedded")
    wait_until(lambda: jobs.status(job) == "in_progress")
    second = start_worker("--embedded")
    assert second.wait(timeout=HANGS_S) == 0
    (tmp_path / "go").touch()
    assert jobs.wait_for_end(job) == "completed"
    assert first.wait(timeout=HANGS_S) == 0
    (record,) = backend.list_workers()
    assert (record.status, record.hardware_type) == ("terminated", "cpu")


def test_no_job_is_forgotten_by_a_worker_that_goes_away(
    jobs: Jobs, backend: Backend, settings: Settings, start_worker: StartWorker
) -> None:
    # A submitter starts a worker only if it sees none. Submissions fall around the moment at which
    # the worker before gives up waiting.
    job = jobs.submit("true")
    process = start_worker("--embedded", OPENWEIGHTS_WORKER_IDLE_S="0.2")
    started = 1
    for index in range(12):
        assert jobs.wait_for_end(job) == "completed"
        time.sleep(0.15 + 0.015 * index)
        job = jobs.submit("true")
        if not backend.list_workers(statuses=["starting", "active"]):
            process = start_worker("--embedded", OPENWEIGHTS_WORKER_IDLE_S="0.2")
            started += 1
    assert jobs.wait_for_end(job) == "completed"
    assert process.wait(timeout=HANGS_S) == 0
    assert started > 1


def test_once_takes_one_job(settings: Settings, jobs: Jobs) -> None:
    assert run_worker(settings, once=True) == 0
    first, second = jobs.submit("true"), jobs.submit("true")
    assert run_worker(settings, once=True) == 0
    assert (jobs.status(first), jobs.status(second)) == ("completed", "pending")


def test_sigterm_lets_the_job_save_and_gives_it_back(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, tmp_path: Path
) -> None:
    job = jobs.submit(SAVING % ('{"saved": 1}', tmp_path / "second"))
    process = start_worker()
    jobs.wait_for_log(job, b"up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANGS_S) == 0
    assert jobs.status(job) == "pending"
    assert jobs.events(job) == [{"saved": 1}]
    assert jobs.error(job) == "its worker was shut down, not counted"
    assert [worker.status for worker in backend.list_workers()] == ["terminated"]
    assert not marked_processes(f"OPENWEIGHTS_HOME={os.environ['OPENWEIGHTS_HOME']}")
    (tmp_path / "second").touch()
    start_worker("--once").wait(timeout=HANGS_S)
    assert [run.status for run in backend.list_runs(job_id=job.id)] == ["failed", "completed"]


def test_a_signal_to_all_processes_at_once_gives_the_job_back(
    jobs: Jobs, home: Path, start_worker: StartWorker
) -> None:
    # As a service manager does: the job is gone before its worker has done anything about it.
    job = jobs.submit("echo up; sleep 9999")
    process = start_worker()
    jobs.wait_for_log(job, b"up")
    for pid in marked_processes(marker_of(home / "runs" / "1")):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANGS_S) == 0
    assert jobs.status(job) == "pending"


def test_a_second_sigterm_hurries(jobs: Jobs, start_worker: StartWorker) -> None:
    job = jobs.submit("trap '' TERM; echo up; while :; do sleep 0.05; done")
    process = start_worker(OPENWEIGHTS_CANCEL_GRACE_S=str(NEVER_S))
    jobs.wait_for_log(job, b"up")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANGS_S) == 0
    assert jobs.status(job) == "pending"


def test_the_store_can_ask_for_the_end(
    jobs: Jobs, backend: Backend, in_thread: Callable[..., WorkerThread], tmp_path: Path
) -> None:
    job = jobs.submit(SAVING % ('{"saved": 1}', tmp_path / "never"))
    with in_thread() as running:
        jobs.wait_for_log(job, b"up")
        backend.set_worker_status(running.worker.id, "shutdown")
        running.join()
        assert running.exit_code == 0
    assert (jobs.status(job), jobs.events(job)) == ("pending", [{"saved": 1}])


def test_a_worker_waits_for_its_store(
    jobs: Jobs, backend: Backend, in_thread: Callable[..., WorkerThread]
) -> None:
    store = Outage(backend)
    store.away = True
    job = jobs.submit("true")
    with in_thread(store) as running:
        wait_until(lambda: len(store.refused) > 2)
        store.away = False
        assert jobs.wait_for_end(job) == "completed"
        store.away = True
        time.sleep(0.3)
        running.shutdown.request()
        running.join()
        assert running.exit_code == 0


@pytest.mark.parametrize("script", ["", "trap '' TERM; echo up; while :; do sleep 0.05; done"])
def test_a_worker_whose_store_was_deleted_ends(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, home: Path, script: str
) -> None:
    if script:
        job = jobs.submit(script)
    process = start_worker(OPENWEIGHTS_CANCEL_GRACE_S=str(NEVER_S))
    if script:
        jobs.wait_for_log(job, b"up")
    else:
        wait_until(backend.list_workers)
    remove_under_use(home)
    assert process.wait(timeout=HANGS_S) in (0, 1)
    assert not marked_processes(f"OPENWEIGHTS_HOME={home}")


class Refusing:
    """A store with a fault: it takes no end of a run."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name == "finish_run":
            raise InvalidStateError("a fault of the store")
        return getattr(self._backend, name)


def test_a_run_whose_end_is_refused_is_given_back_not_repeated(
    jobs: Jobs, backend: Backend, in_thread: Callable[..., WorkerThread], tmp_path: Path
) -> None:
    job = jobs.submit(f"echo x >> {tmp_path}/executions")
    with in_thread(Refusing(backend)) as running:
        running.join()
        assert running.exit_code == 1
    assert (tmp_path / "executions").read_text() == "x\n"
    assert jobs.status(job) == "pending"


def test_a_broken_driver_ends_a_worker_but_not_an_embedded_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigurationError, match="nvidia-smi"):
        run_worker(settings, once=True)
    assert run_worker(settings, lane="jobs", once=True) == 0


def test_a_worker_removes_what_is_old_when_it_is_told_for_how_long_to_keep(
    settings: Settings, jobs: Jobs, backend: Backend, home: Path
) -> None:
    file = backend.put_file(io.BytesIO(b"nobody's"), "conversations", "f")
    with contextlib.closing(sqlite3.connect(home / "openweights.db")) as db, db:
        db.execute("UPDATE files SET used_at = 0, created_at = 0")
    assert run_worker(settings, once=True) == 0
    assert backend.get_file(file.id) == backend.list_files()[0], "by itself it removes nothing"
    assert run_worker(replace(settings, keep_days=1.0), once=True) == 0
    assert backend.list_files() == []


def test_a_store_of_a_newer_version_is_refused_in_one_line(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    with contextlib.closing(sqlite3.connect(newer / "openweights.db")) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    assert start_worker("--once", OPENWEIGHTS_HOME=str(newer)).wait(timeout=HANGS_S) == 1
    told = (tmp_path / "worker.log").read_text().splitlines()
    assert len(told) == 1 and "written by a newer openweights" in told[0]
