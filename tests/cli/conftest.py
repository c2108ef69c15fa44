"""The real `ow`, in this process and in its own, and a store to fill."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.cli import main
from openweights.settings import Settings
from openweights.types import Claim, EventDraft, JobSpec, WorkerSpec
from tests.waiting import HANGS_S

REPOSITORY = Path(__file__).parents[2]

Ow = Callable[..., Result]


@pytest.fixture
def ow(home: Path) -> Ow:
    """`ow("ls", "--json")` in this process."""

    def invoke(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, arguments, input=stdin, prog_name="ow")

    return invoke


@pytest.fixture
def ow_process(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ow_process("ls", cwd=…)` in a process of its own."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [sys.executable, "-m", "openweights.cli", *arguments],
            env=process_env() | options.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=HANGS_S,
            check=False,
            **options,
        )

    return run


def process_env() -> dict[str, str]:
    """The environment with this very package importable, from whatever folder `ow` is started."""
    return {"PYTHONPATH": str(REPOSITORY)} | dict(os.environ)


@pytest.fixture
def backend(home: Path) -> Iterator[Backend]:
    """The store that `ow` will find."""
    store = open_backend(Settings.from_env())
    yield store
    store.close()


def submit(backend: Backend, job_id: str, **options: Any) -> JobSpec:
    """A pending job."""
    params = {"validated_params": {"loss": "sdft", "r": 8}, "cloud_type": "SECURE"}
    spec = JobSpec(id=job_id, type="fine-tuning", script="true", params=params, model="org/tiny")
    spec = replace(spec, **options)
    backend.submit_job(spec)
    return spec


def claim(backend: Backend, job_id: str, **options: Any) -> Claim:
    """The job, submitted and taken by a worker of its own."""
    submit(backend, job_id, **options)
    worker = backend.register_worker(WorkerSpec(id=f"worker-of-{job_id}"))
    taken = backend.claim_job(worker.id)
    assert taken is not None and taken.job.id == job_id
    return taken


def log_events(backend: Backend, run_id: int, *events: dict[str, Any]) -> None:
    """Append events to a run."""
    now = datetime.now(UTC)
    drafts = [EventDraft(uuid.uuid4().hex, data, now) for data in events]
    backend.append_events(run_id, drafts)
