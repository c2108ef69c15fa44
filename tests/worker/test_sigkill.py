"""Workers killed at random moments: every job completes, once, and nothing of a run outlives it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights.backends.base import Backend
from openweights.settings import Settings
from openweights.types import JobRecord, WorkerSpec
from openweights.worker.folder import marker_of
from openweights.worker.process import kill_strays, marked_processes
from tests.waiting import HANGS_S, comes_true, wait_until
from tests.warm.stack import PATHS
from tests.worker.harness import Jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

JOBS = 20
STEPS = 4
SEED = 20260

# Logs steps, leaves daemons behind, and counts processes that runs before it left.
TRAINER = f"""
import os, pathlib, subprocess, time
from openweights import OpenWeights

def run_of(process):
    try:
        parts = (process / "environ").read_bytes().split(b"\\0")
    except OSError:
        return None
    env = dict(part.split(b"=", 1) for part in parts if b"=" in part)
    if env.get(b"OPENWEIGHTS_HOME") == os.environb[b"OPENWEIGHTS_HOME"]:
        return env.get(b"OPENWEIGHTS_RUN_ID")

mine = {{None, os.environb[b"OPENWEIGHTS_RUN_ID"]}}
strays = sum(run_of(p) not in mine for p in pathlib.Path("/proc").iterdir() if p.name.isdigit())
subprocess.Popen(["setsid", "sleep", "300"])
run = OpenWeights().run
run.log({{"strays": strays}})
for step in range({STEPS}):
    run.log({{"step": step}})
    time.sleep(0.02)
pathlib.Path("uploads/done").write_text("result")
"""

# Where to kill: a condition to wait for, from the folder of runs, and the job's record.
Moment = Callable[[Path, Jobs, JobRecord], object]
MOMENTS: dict[str, Moment] = {
    "starting": lambda *_: True,
    "claimed": lambda _, jobs, job: jobs.status(job) != "pending",
    "unpacking": lambda runs, *_: list(runs.glob("*")),
    "running": lambda _, jobs, job: jobs.events(job),
    "finishing": lambda runs, *_: list(runs.glob("*/uploads/done")),
    "removing": lambda _, jobs, job: jobs.status(job) == "completed",
}


@pytest.fixture
def settings(home: Path) -> Settings:
    # The lease is longer than the test: what helps is that the store notices a death at once.
    return Settings(home=home, lease_s=120.0, heartbeat_s=0.1, cancel_grace_s=1.0)


@pytest.fixture
def marker(home: Path) -> Iterator[str]:
    """In the environment of every process of this test's workers and jobs."""
    marker = f"OPENWEIGHTS_HOME={home}"
    yield marker
    kill_strays(marker)


@pytest.mark.long
def test_every_job_completes_though_workers_are_killed(
    jobs: Jobs,
    backend: Backend,
    home: Path,
    marker: str,
    start_worker: Callable[..., subprocess.Popen[bytes]],
) -> None:
    chance = random.Random(SEED)
    kills = {name: 0 for name in MOMENTS}
    mounted = {"trainer.py": TRAINER.encode(), "data/more": os.urandom(1 << 20)}
    submitted = []

    def work_and_be_killed(job: JobRecord, moment: str | None) -> None:
        process = start_worker()
        if moment is None:
            assert jobs.wait_for_end(job) == "completed"
        else:
            wait_until(lambda: MOMENTS[moment](home / "runs", jobs, job))
            time.sleep(chance.choice([0, chance.uniform(0, 0.1)]))
            kills[moment] += 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    for index in range(JOBS):
        job = jobs.submit("python trainer.py & wait $!", mounted, max_attempts=100)
        submitted.append(job)
        work_and_be_killed(job, list(MOMENTS)[index % len(MOMENTS)])
        while jobs.status(job) != "completed":
            work_and_be_killed(job, chance.choice([None, None, *MOMENTS]))
    wait_until(lambda: not marked_processes(marker))
    assert all(kills.values())
    # The last worker may have been killed before it removed its folder; the next one does.
    assert start_worker("--once").wait(timeout=HANGS_S) == 0
    assert not list((home / "runs").iterdir())
    for job in submitted:
        check_job(backend, job)
    with contextlib.closing(sqlite3.connect(home / "openweights.db")) as db:
        twice = "SELECT run_id, key FROM events GROUP BY run_id, key HAVING count(*) > 1"
        assert db.execute(twice).fetchall() == []


def check_job(backend: Backend, job: JobRecord) -> None:
    """One completed run, the last; attempts without a gap; steps in order, all in the last."""
    runs = backend.list_runs(job_id=job.id)
    steps: list[int] = []
    uploads: list[str] = []
    assert [run.attempt for run in runs] == list(range(1, len(runs) + 1))
    assert [run.status for run in runs] == ["failed"] * (len(runs) - 1) + ["completed"]
    for run in runs:
        events = [dict(event.data) for event in backend.list_events(run_id=run.id)]
        steps = [event["step"] for event in events if "step" in event]
        assert steps == list(range(len(steps)))
        assert all(event["strays"] == 0 for event in events if "strays" in event)
        uploads = [event["path"] for event in events if "path" in event]
        assert len(uploads) <= 1
    assert (len(steps), uploads) == (STEPS, ["done"])


def test_what_survives_worker_and_guard_ends_before_the_next_run(
    jobs: Jobs, home: Path, marker: str, start_worker: Callable[..., subprocess.Popen[bytes]]
) -> None:
    of_run = marker_of(home / "runs" / "1")
    count = f"grep -lz '^{of_run}$' /proc/[0-9]*/environ 2> /dev/null | wc -l"
    job = jobs.submit(
        f'test "$OPENWEIGHTS_RUN_ID" = 1 || {{ {count}; exit; }}; '
        "setsid setsid sleep 9999 & (setsid sleep 9999 &) ; echo up; sleep 9999"
    )
    process = start_worker()
    jobs.wait_for_log(job, b"up")
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked_processes(of_run)}
    (guard,) = (pid for pid, command in commands.items() if b"guard.py" in command)
    process.send_signal(signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not comes_true(lambda: not marked_processes(of_run), within_s=0.5)
    start_worker()
    assert jobs.wait_for_end(job) == "completed"
    assert jobs.log(job) == b"0\n"
    assert not marked_processes(of_run)
    wait_until(lambda: not list((home / "runs").iterdir()))


# A worker that registers, claims and starts a job; the guard holds the store's descriptors or not.
CLAIMER = """
import os, sys
from pathlib import Path
from openweights.backends import open_backend
from openweights.settings import Settings
from openweights.types import WorkerSpec
from openweights.worker.folder import marker_of
from openweights.worker.process import GuardedProcess
is_held, folder, marker = sys.argv[1] == "held", Path(sys.argv[2]), sys.argv[3]
backend = open_backend(Settings(home=Path(os.environ["OPENWEIGHTS_HOME"]), lease_s=120.0))
backend.register_worker(WorkerSpec("first"))
claim = backend.claim_job("first")
process = GuardedProcess(
    claim.job.script, folder=folder, env=os.environ, grace_s=1, marker=marker,
    held_fds=backend.liveness_fds if is_held else (),
)
(folder / "guard").write_text(str(process._guard.pid))
process.wait()
"""


@pytest.mark.parametrize("kind", ["held", "control"])
def test_a_job_is_not_given_away_while_its_processes_exist(
    jobs: Jobs, backend: Backend, tmp_path: Path, home: Path, marker: str, kind: str
) -> None:
    # The guard is stopped, so that the time in which it kills the job lasts as long as we want.
    job = jobs.submit("touch up; sleep 9999")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMER, kind, str(tmp_path), marker], env=env
    )
    wait_until(lambda: (tmp_path / "up").exists() and (tmp_path / "guard").exists())
    wait_until((tmp_path / "guard").read_text)
    guard = int((tmp_path / "guard").read_text())
    os.kill(guard, signal.SIGSTOP)
    process.kill()
    process.wait()
    backend.register_worker(WorkerSpec("second"))
    claim = backend.claim_job("second")
    assert len(marked_processes(marker)) >= 2
    # Without the descriptors the store takes the worker for dead, and the job runs twice.
    assert (claim is None) == (kind == "held")
    os.kill(guard, signal.SIGCONT)
    wait_until(lambda: not marked_processes(marker))
    taken: Any = None
    wait_until(lambda: backend.claim_job("second"))
    taken = backend.claim_job("second")
    assert (taken.job.id, taken.run.attempt) == (job.id, 2)
