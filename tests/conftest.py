"""What every test gets: a clean environment, an empty home, and no process that outlives it."""

from __future__ import annotations

import functools
import gc
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# What is the machine's to say and no test's: where programs, downloads and packages lie, how to
# reach the network, how many threads compute and with which instructions.
_KEPT = re.compile(
    r"(PYTHON|LD_LIBRARY_)?PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|VIRTUAL_ENV|CI|HF_HOME|HF_HUB_CACHE"
    r"|(?i:https?_proxy|no_proxy|all_proxy)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|(PIP|UV|npm|NPM)_\w+|(PYTEST|HYPOTHESIS|COVERAGE|COV|OW_TEST_SUPABASE)_\w+"
    r"|CHROMIUM|PLAYWRIGHT_\w+|OW_TEST_SCREENSHOTS"
    r"|(OMP|MKL|KMP|GOMP|ATEN|ONEDNN|DNNL|OPENBLAS|CUDA|NVIDIA|TRITON|TORCH)_\w+"
)


def _forget_the_caller() -> dict[str, str]:
    """Takes everything else out of the environment; returns what is left.

    Here and not in a fixture, since many packages read their variables when they are imported.
    """
    for name in list(os.environ):
        if not _KEPT.fullmatch(name):
            del os.environ[name]
    # Port 9 of this machine, where nobody listens: whether there is a hub is no machine's to say
    # either, and to it models such as org/model do not exist.
    os.environ.update(LANG="C.UTF-8", TZ="UTC", HF_ENDPOINT="http://127.0.0.1:9")
    time.tzset()
    return dict(os.environ)


_ENVIRONMENT = _forget_the_caller()
# How long an example takes, or its making, says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
gc.disable()  # until everything is imported, of which nothing is garbage

from openweights.errors import PlatformError  # noqa: E402
from openweights.needs import has_gpu  # noqa: E402
from openweights.settings import Settings  # noqa: E402
from tests.warm.stack import SITE, StackServer, WarmStack  # noqa: E402

if TYPE_CHECKING:
    from execnet import XSpec
    from xdist.workermanage import WorkerController

    from tests.supabase_double.postgres import PostgresServer
    from tests.supabase_double.team import Team

_STACK = pytest.StashKey[StackServer]()


def pytest_configure() -> None:
    """Ctrl-C reaches the processes that tests start.

    A shell starts what it puts into the background with SIGINT ignored, and every process below
    inherits that: a test that interrupts one would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[XSpec]) -> None:
    """Processes that share the tests share the warm stack: it is of the one that starts them.

    They are forks of one that has imported the tests, too, where no GPU would be lost so.
    """
    config.stash[_STACK] = StackServer()
    config.add_cleanup(config.stash[_STACK].close)
    if has_gpu(os.environ):
        return
    tests = StackServer(config.args)
    config.add_cleanup(tests.close)
    for spec in specs:
        spec.python = shlex.join([sys.executable, str(SITE / "asking.py"), tests.path])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Each is told where the warm stack is."""
    node.workerinput["stack"] = node.config.stash[_STACK].path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `numeric`: the tests of every file that compares what torch has computed.

    Files with a test that takes long come first, so that at the end no process waits for another:
    those of jobs that start warm, which share one process so, and of whatever is marked `long`.
    """
    long: set[Path] = set()
    for item in items:
        if _compares_numbers(item.path):
            item.add_marker(pytest.mark.numeric)
        fixtures: list[str] = getattr(item, "fixturenames", [])
        if "stack" in fixtures or item.get_closest_marker("long"):
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What the imports made stays for good, so that looking for garbage need not look at it.

    accelerate looks whenever a trainer starts: a third of a second through half a million objects.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@functools.cache
def _compares_numbers(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return bool(re.search(r"^from tests\.rounding import|\btorch\.equal\(", text, re.M))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of the start, an empty home, and an empty working directory, which jobs get.

    A job that runs in this process leaves variables behind; none of them reaches the next test.
    Workers that the home has started are asked to end.
    """
    for name in set(os.environ) - set(_ENVIRONMENT):
        if not name.startswith("PYTEST_"):
            del os.environ[name]
    folder = tmp_path / "home"
    monkeypatch.setenv("OPENWEIGHTS_HOME", str(folder))
    monkeypatch.setenv("OPENWEIGHTS_WORKER_IDLE_S", "1")
    monkeypatch.setenv("OPENWEIGHTS_CANCEL_GRACE_S", "2")
    cwd = tmp_path.with_name(f"{tmp_path.name}.cwd")  # not among what a test finds in its folder
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    yield
    if (folder / "openweights.db").is_file():
        _stop_workers(Settings(home=folder))


@pytest.fixture
def home(clean_environment: None, tmp_path: Path) -> Path:
    """The folder of the embedded store."""
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model, which no test changes."""
    from tests.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[WarmStack]:
    """A process that has imported the training stack, as soon as the first test asks it."""
    shared: dict[str, str] = getattr(request.config, "workerinput", {})
    if "stack" in shared:
        yield WarmStack(shared["stack"])
        return
    with closing(StackServer()) as server:
        yield WarmStack(server.path)


@pytest.fixture
def warm_jobs(stack: WarmStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs, whoever starts them, import nothing that `stack` has."""
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)


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
