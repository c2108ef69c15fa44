"""A worker on this machine that stands still for longer than its lease: one job, one runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.worker.folder import marker_of
from openweights.worker.process import marked_processes
from tests.waiting import HANGS_S, comes_true, until_exists, wait_until
from tests.worker.harness import Jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LEASE_S = 1.0
StartWorker = Callable[..., subprocess.Popen[bytes]]


def start_with_lease(start_worker: StartWorker) -> subprocess.Popen[bytes]:
    return start_worker(OPENWEIGHTS_LEASE_S=str(LEASE_S))


@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "control"])
def test_a_stopped_workers_job_is_not_started_twice(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, tmp_path: Path, signum: int
) -> None:
    trace = tmp_path / "trace"
    held = until_exists(tmp_path / "go")
    job = jobs.submit(f"echo start >> {trace}; {held}; echo end >> {trace}")
    first = start_with_lease(start_worker)
    wait_until(trace.exists)
    second = start_with_lease(start_worker)
    wait_until(lambda: len(backend.list_workers(statuses=["active"])) == 2)
    first.send_signal(signum)
    is_control = signum == signal.SIGKILL
    within_s = HANGS_S if is_control else 3 * LEASE_S
    assert comes_true(lambda: jobs.attempts(job) == 2, within_s) == is_control
    (tmp_path / "go").touch()
    first.send_signal(signal.SIGCONT)
    assert jobs.wait_for_end(job) == "completed"
    assert trace.read_text().count("start") == 1 + is_control
    assert trace.read_text().count("end") == 1
    assert second.poll() is None


def test_a_worker_that_wakes_without_its_job_ends_it_before_anything_else(
    jobs: Jobs, backend: Backend, start_worker: StartWorker, home: Path, tmp_path: Path
) -> None:
    """Somebody has canceled and restarted the job meanwhile."""
    trace = tmp_path / "trace"
    held = until_exists(tmp_path / "go")
    job = jobs.submit(f"echo start >> {trace}; {held}; echo end $OPENWEIGHTS_RUN_ID >> {trace}")
    first = start_with_lease(start_worker)
    wait_until(trace.exists)
    first.send_signal(signal.SIGSTOP)
    backend.cancel_job(job.id)
    backend.restart_job(job.id)
    of_first = marker_of(home / "runs" / "1")
    (guard, *_) = marked_processes(of_first)
    for pid in marked_processes(of_first):
        if pid != guard:
            os.kill(pid, signal.SIGSTOP)  # so that it cannot have ended by itself
    start_with_lease(start_worker)
    wait_until(lambda: jobs.attempts(job) == 2)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: not marked_processes(of_first))
    (tmp_path / "go").touch()
    assert jobs.wait_for_end(job) == "completed"
    assert trace.read_text().splitlines() == ["start", "start", "end 2"]
    assert [run.status for run in backend.list_runs(job_id=job.id)] == ["canceled", "completed"]
