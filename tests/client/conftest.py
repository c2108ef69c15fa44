"""A client on an empty store, and a worker's side of it to play."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.backends.base import Backend
from openweights.types import Claim, EventDraft, WorkerSpec


class QuietClient(OpenWeights):
    """A client that starts no worker: the test plays the worker's part."""

    def ensure_worker(self) -> None:
        pass


def _store(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which store the environment names, for the client and the processes that it starts."""
    if request.param == "supabase":
        request.getfixturevalue("team").set_environment(monkeypatch.setenv)
    return request.param


_supabase_too = pytest.param("supabase", marks=pytest.mark.slow)
store = pytest.fixture(params=["local", _supabase_too], name="store")(_store)
# For a file that imports it: both stores also in the default run.
every_store = pytest.fixture(params=["local", "supabase"], name="store")(_store)


@pytest.fixture
def ow(store: str) -> Iterator[QuietClient]:
    client = QuietClient()
    yield client
    client.close()


@pytest.fixture
def claim(ow: QuietClient) -> Callable[[], Claim]:
    """Takes the next pending job, as a new worker."""

    def take() -> Claim:
        worker = ow.backend.register_worker(WorkerSpec(id=f"worker-{uuid.uuid4().hex[:12]}"))
        claimed = ow.backend.claim_job(worker.id)
        assert claimed is not None
        return claimed

    return take


def append(backend: Backend, run_id: int, *events: dict[str, Any]) -> None:
    """Append events to a run, as its job would."""
    now = datetime.now(UTC)
    backend.append_events(run_id, [EventDraft(uuid.uuid4().hex, data, now) for data in events])
