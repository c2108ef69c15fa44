"""What every test gets: a clean environment, an empty home, and no process that outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from openweights.errors import PlatformError
from openweights.settings import Settings

_PREFIXES = ("OPENWEIGHTS_", "OW_", "SUPABASE_", "HF_", "RUNPOD_", "WANDB_", "OPENAI_")
# Where downloads are kept, and whether there may be any, is the machine's to say.
_KEPT = frozenset({"HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OW_TEST_SUPABASE_URL"})


def pytest_configure() -> None:
    """Ctrl-C reaches the processes that tests start.

    A shell starts what it puts into the background with SIGINT ignored, and every process below
    inherits that: a test that interrupts one would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of our variables, and an empty home; its self-started workers are asked to end."""
    for name in os.environ:
        if name.startswith(_PREFIXES) and name not in _KEPT:
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("OPENWEIGHTS_HOME", str(folder))
    monkeypatch.setenv("OPENWEIGHTS_WORKER_IDLE_S", "1")
    monkeypatch.setenv("OPENWEIGHTS_CANCEL_GRACE_S", "2")
    yield
    if (folder / "openweights.db").is_file():
        _stop_workers(Settings(home=folder))


@pytest.fixture
def home(clean_environment: None, tmp_path: Path) -> Path:
    """The folder of the embedded store."""
    return tmp_path / "home"


def _stop_workers(settings: Settings) -> None:
    from openweights.backends import open_backend

    backend = open_backend(settings)
    # The store may be one that a test has broken.
    with closing(backend), suppress(PlatformError):
        for worker in backend.list_workers(statuses=["starting", "active"]):
            backend.set_worker_status(worker.id, "shutdown")
