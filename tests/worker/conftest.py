"""Fixtures: a real store, jobs that are shell scripts, and workers in this process or in processes
of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights import hardware
from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.settings import Settings
from tests.worker.harness import Jobs, WorkerThread


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, lease_s=5.0, heartbeat_s=0.2, worker_idle_s=0.5, cancel_grace_s=1.0)


@pytest.fixture
def backend(settings: Settings) -> Iterator[Backend]:
    with contextlib.closing(open_backend(settings)) as backend:
        yield backend


@pytest.fixture
def jobs(backend: Backend) -> Jobs:
    return Jobs(backend)


@pytest.fixture
def in_thread(settings: Settings, backend: Backend) -> Callable[..., WorkerThread]:
    """Makes a worker in this process; use it as a context manager."""

    def make(store: Any = None, found: hardware.Hardware = hardware.CPU) -> WorkerThread:
        return WorkerThread(settings, backend if store is None else store, found)

    return make


@pytest.fixture
def worker(jobs: Jobs, in_thread: Callable[..., WorkerThread]) -> Iterator[WorkerThread]:
    with in_thread() as running:
        yield running


StartWorker = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_worker(settings: Settings, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers in processes of their own, as a client does; kills them at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(":")]
        with (tmp_path / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "openweights.worker.main", *arguments],
                env={**settings.child_env(), "PYTHONPATH": ":".join(filter(None, paths)), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
