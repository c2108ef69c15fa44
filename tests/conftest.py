"""What every test gets: a clean environment, an empty home, and no process that outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openweights.errors import PlatformError
from openweights.settings import Settings

if TYPE_CHECKING:
    from tests.supabase_double.postgres import PostgresServer
    from tests.supabase_double.team import Team

_PREFIXES = ("OPENWEIGHTS_", "OW_", "SUPABASE_", "HF_", "RUNPOD_", "WANDB_", "OPENAI_")
# Where downloads are kept, and whether there may be any, is the machine's to say.
_KEPT = frozenset({"HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"})
_KEPT_PREFIX = "OW_TEST_SUPABASE_"


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
        if name.startswith(_PREFIXES) and not (name in _KEPT or name.startswith(_KEPT_PREFIX)):
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


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The PostgreSQL of this test run, started when the first test asks for it."""
    from tests.supabase_double.postgres import running_server

    with running_server() as server:
        yield server


@pytest.fixture
def project(postgres: PostgresServer) -> str:
    """URL of a database of the test's own, with our schema."""
    return postgres.create_project()


@pytest.fixture(scope="session")
def double(postgres: PostgresServer) -> Iterator[str]:
    """The address of a server that has every database as a Supabase project."""
    from tests.supabase_double.team import running_double

    with running_double(postgres) as url:
        yield url


@pytest.fixture(scope="session")
def shared_project(postgres: PostgresServer) -> str:
    """URL of a database in which many tests have an organization each."""
    return postgres.create_project()


@pytest.fixture
def team(shared_project: str, double: str) -> Iterator[Team]:
    """An organization of the test's own, in a project that the double serves."""
    from tests.supabase_double.team import Team

    with closing(Team(shared_project, double)) as team:
        yield team


def _stop_workers(settings: Settings) -> None:
    from openweights.backends import open_backend

    backend = open_backend(settings)
    # The store may be one that a test has broken.
    with closing(backend), suppress(PlatformError):
        for worker in backend.list_workers(statuses=["starting", "active"]):
            backend.set_worker_status(worker.id, "shutdown")
