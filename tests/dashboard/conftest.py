"""A store with runs in it, and the real server over it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from openweights import OpenWeights
from openweights.dashboard.access import Sessions
from openweights.dashboard.app import create_app
from openweights.settings import Settings
from openweights.types import Claim, EventDraft, JobSpec, JobType, WorkerSpec
from tests.waiting import HANGS_S

API_KEY = "sk-ow-of-the-tests"
COOKIE = "openweights_tests"
PAGE = {"x-openweights": "page"}


@dataclass
class Served:
    """A running server."""

    url: str
    ow: OpenWeights
    sessions: Sessions
    tokens: list[str]
    browsers: list[httpx.Client] = field(default_factory=list[httpx.Client])

    def browser(self) -> httpx.Client:
        """A browser's side of HTTP: let in by the token, sending what our page sends."""
        client = httpx.Client(base_url=self.url, headers=PAGE)
        self.browsers.append(client)
        assert client.get(f"/?token={self.tokens[-1]}").status_code == 303
        return client


@contextmanager
def serving(ow: OpenWeights) -> Iterator[Served]:
    tokens: list[str] = []
    sessions = Sessions(ow, API_KEY, tokens.append)
    app = create_app(sessions, None, COOKIE)
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", ow, sessions, tokens)
        yield served
        for browser in served.browsers:
            browser.close()
    finally:
        app.state.stopping.set()
        server.should_exit = True
        thread.join(timeout=HANGS_S)
        assert not thread.is_alive()
        sessions.close()


@pytest.fixture
def ow(home: Path) -> Iterator[OpenWeights]:
    client = OpenWeights(settings=Settings(home=home))
    yield client
    client.close()


@pytest.fixture
def served(ow: OpenWeights) -> Iterator[Served]:
    with serving(ow) as server:
        yield server


@pytest.fixture
def browser(served: Served) -> httpx.Client:
    return served.browser()


@pytest.fixture
def run_job(ow: OpenWeights) -> Callable[..., Claim]:
    """Puts a job with a run, events and a log into the store."""

    def run(
        job_id: str,
        events: list[dict[str, Any]],
        *,
        log: str = "",
        status: str | None = "completed",
        error: str | None = None,
        job_type: JobType = "fine-tuning",
        **params: Any,
    ) -> Claim:
        backend = ow.backend
        backend.register_worker(WorkerSpec(id="worker"))
        validated = {"model": "org/model", "loss": "sft", **params}
        spec = JobSpec(
            id=job_id,
            type=job_type,
            script="true",
            params={"validated_params": validated, "cloud_type": "SECURE"},
            model=validated["model"],
        )
        backend.submit_job(spec)
        claim = backend.claim_job("worker")
        assert claim is not None
        start = datetime.now(UTC) - timedelta(seconds=len(events))
        drafts = [
            EventDraft(str(at), data, start + timedelta(seconds=at))
            for at, data in enumerate(events)
        ]
        for first in range(0, len(drafts), 5000):
            backend.append_events(claim.run.id, drafts[first : first + 5000])
        if log:
            backend.append_log(claim.run.id, 0, log.encode())
        if status is not None:
            backend.finish_run(claim.run.id, claim.run.attempt, status, error=error)  # type: ignore[arg-type]
        return claim

    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser; tests that use it are marked `browser`."""
    playwright = pytest.importorskip("playwright.sync_api")
    from tests.dashboard.visitor import FLAGS

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium; install one, or name it with CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
