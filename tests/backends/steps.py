"""The steps that the tests of stores are made of, and how they let time pass."""

from __future__ import annotations

import dataclasses
import itertools
import time
from datetime import UTC, datetime
from typing import Any

from openweights.backends.base import Backend
from openweights.types import Claim, EventDraft, JobSpec, WorkerSpec

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
_keys = itertools.count()


def spec(job_id: str = "job-1", **changes: Any) -> JobSpec:
    base = JobSpec(
        id=job_id,
        type="custom",
        script="true",
        params={"validated_params": {"x": 1}, "cloud_type": "SECURE"},
    )
    return dataclasses.replace(base, **changes)


def draft(**data: Any) -> EventDraft:
    return EventDraft(f"key-{next(_keys)}", data, NOW)


def claim(backend: Backend, worker_id: str = "w1") -> Claim:
    found = backend.claim_job(worker_id)
    assert found is not None
    return found


def start(backend: Backend, *, worker_id: str = "w1", **changes: Any) -> Claim:
    """Submit one job and have a new worker claim it."""
    backend.register_worker(WorkerSpec(worker_id))
    backend.submit_job(spec(**changes))
    return claim(backend, worker_id)


class Contract:
    """Base of the contract's parts; a store that can do better than to sleep overrides it."""

    def pass_time(self, backend: Backend, seconds: float) -> None:
        time.sleep(seconds)

    def age(self, backend: Backend, seconds: float) -> None:
        """Let all that was done be past for that much longer."""
        self.pass_time(backend, seconds)

    def pass_lease(self, backend: Backend) -> None:
        self.pass_time(backend, backend.lease_s * 1.5)
