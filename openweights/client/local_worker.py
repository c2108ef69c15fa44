"""The worker that starts by itself: with the embedded store, a submitted job needs nobody to start
one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from openweights.backends.local.worker_locks import has_lost_its_worker
from openweights.client.bundle import package_folder
from openweights.client.watching.notes import tell_last
from openweights.client.watching.queue import (
    gpu_gb,
    is_answered_apart,
    is_first_answered_beside,
)
from openweights.errors import PlatformError
from openweights.settings import Settings
from openweights.types import ANSWERING_PREFIX, SERVED, SERVING_PREFIX, JobRecord, Lane

if TYPE_CHECKING:
    from openweights.backends.base import Backend

logger = logging.getLogger(__name__)

# A process that we started is given this long to register itself before another one is started.
START_S = 30.0
_POLL_S = 0.2
_MOST_FAILURES = 3
_TAIL_BYTES = 2000
_OPTIONS: dict[Lane, str] = {
    "jobs": "--embedded",
    "servers": "--serving",
    "questions": "--answering",
}


class LocalWorkers:
    """Keeps workers of the embedded store running while there is something to do: one for all jobs
    that end, one for each deployed model, and one for questions, which do not wait for the end of
    a job beside which they can be answered.
    """

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self._backend = backend
        self._has_left_standby = False
        self._lanes: dict[Lane, LocalWorker] = {
            "jobs": LocalWorker(settings, "jobs"),
            "servers": LocalWorker(settings, "servers"),
            "questions": LocalWorker(settings, "questions"),
        }

    def ensure(self) -> None:
        """Start what is missing.

        Raises:
            PlatformError: A worker cannot be started, or ends at once again and again.
        """
        running = self._backend.list_jobs(statuses=["in_progress"], limit=None)
        alive = self._backend.list_workers(statuses=["starting", "active"])
        due = self._backend.place_in_queue().ahead
        asked = is_first_answered_beside(due, running, gpu_gb(alive))
        # Scripts run by themselves, and what is answered has its worker.
        jobs = [job for job in running if job.type != "script" and not is_answered_apart(job)]
        jobs += [] if due.total else self._later_jobs()
        served = sum(job.type == SERVED for job in jobs) + due.total - due.ending
        wanted = served < len(jobs) + due.total
        servers = sum(worker.id.startswith(SERVING_PREFIX) for worker in alive)
        answering = sum(worker.id.startswith(ANSWERING_PREFIX) for worker in alive)
        self._lanes["jobs"].ensure(len(alive) - servers - answering, int(wanted))
        self._lanes["servers"].ensure(servers, served)
        self._lanes["questions"].ensure(answering, int(asked))

    def _later_jobs(self) -> list[JobRecord]:
        """Those that nobody may take now, once: a worker that comes for them leaves a standby
        behind, which starts the next one in time.
        """
        if self._has_left_standby:
            return []
        later = self._backend.list_jobs(statuses=["pending"], limit=None)
        self._has_left_standby = bool(later)
        return later


class LocalWorker:
    """Starts the workers of a lane.

    Two clients may start one for jobs at the same time; a lock in the store's folder lets one of
    them stay.
    """

    def __init__(self, settings: Settings, lane: Lane) -> None:
        self._settings = settings
        self._lane: Lane = lane
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._alive_before = 0
        self._failures = 0

    def ensure(self, alive: int, wanted: int) -> None:
        """Start a worker if fewer are alive than there should be.

        Raises:
            PlatformError: It cannot be started, or ends at once again and again.
        """
        if alive >= wanted:
            self._failures = 0
            return
        if self._is_starting(alive):
            return
        self._process = start_worker(self._settings, self._lane)
        self._started_at, self._alive_before = time.monotonic(), alive
        logger.info("started a worker, process %d", self._process.pid)

    def _is_starting(self, alive: int) -> bool:
        if self._process is None or alive > self._alive_before:
            return False
        code = self._process.poll()
        if code is None:
            return time.monotonic() - self._started_at < START_S
        self._process = None
        # 0: it found another worker, or had nothing left to do.
        self._failures = 0 if code == 0 else self._failures + 1
        if self._failures >= _MOST_FAILURES:
            self._failures = 0
            log = log_path(self._settings)
            raise PlatformError(
                f"the worker ends at once (exit code {code}); {log} ends with:\n{_tail(log)}"
            )
        return False


def take_up(settings: Settings) -> bool:
    """Start a worker for jobs that have lost theirs and all that looked after it, as in a reboot;
    says whether it did. A worker that was asked to end is not replaced.

    Raises:
        PlatformError: It cannot be started.
    """
    from openweights.backends import open_backend

    if settings.is_remote or not has_lost_its_worker(settings.home):
        return False
    with closing(open_backend(settings)) as backend:
        if what_waits(backend) == "none":
            return False
    start_worker(settings)
    return True


def what_waits(backend: Backend) -> Literal["now", "later", "none"]:
    """Whether jobs wait that the worker for jobs could take, or could take later; deployed models
    have workers of their own, which clients start.
    """
    backend.list_workers()  # what the dead ones held waits from then on
    if backend.place_in_queue().ahead.ending:
        return "now"
    pending = backend.list_jobs(statuses=["pending"], limit=None)
    return "later" if any(job.type != SERVED for job in pending) else "none"


def log_path(settings: Settings) -> Path:
    """Where self-started workers write what they have to say."""
    return settings.home / "worker.log"


def open_log(settings: Settings) -> BinaryIO:
    """The same, to write at its end; nobody else may read it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    return open(os.open(log_path(settings), flags, 0o600), "ab")


def start_worker(settings: Settings, lane: Lane = "jobs") -> subprocess.Popen[bytes]:
    """Start a worker that outlives this process and goes away when it has been idle.

    Raises:
        PlatformError: The process cannot be started.
    """
    command = [sys.executable, "-m", "openweights.worker.main", _OPTIONS[lane]]
    return _start(settings, command, _child_env(settings))


@contextmanager
def workers_beside(settings: Settings, backend: Backend, count: int) -> Generator[None]:
    """So many workers that share this machine's cores, until the block or this process ends; what
    they are at then goes back to the queue. Of one the store takes care by itself, and of a
    project's others do.

    Raises:
        PlatformError: They cannot be started.
    """
    if count <= 1 or settings.is_remote:
        with _said_last(lambda: "the jobs go on; `ow ls` shows them, `ow cancel JOB` stops one"):
            yield
        return
    command = [sys.executable, "-m", "openweights.worker.main", "--while-held"]
    env = {"OMP_NUM_THREADS": str(own_threads(count)), **_child_env(settings)}
    started: list[subprocess.Popen[bytes]] = []
    with _said_last(lambda: _without_them(backend)):
        try:
            started += [_start(settings, command, env, subprocess.PIPE) for _ in range(count)]
            _await_workers(backend, count)
            yield
        finally:
            _end(settings, backend, started)


@contextmanager
def _said_last(words: Callable[[], str]) -> Generator[None]:
    """Whoever interrupts the block is told these words, which are asked for behind it."""
    try:
        yield
    except KeyboardInterrupt as error:
        tell_last(logger, error, words())
        raise


def _end(settings: Settings, backend: Backend, started: Iterable[subprocess.Popen[bytes]]) -> None:
    """End these workers in good order, and say so where somebody has to wait for that."""
    if backend.list_jobs(statuses=["in_progress"], limit=1):
        grace = f"{settings.cancel_grace_s:.0f} s at most"
        logger.warning("stopping the workers: what they train is saved first (%s)", grace)
    for process in started:
        process.terminate()
    for process in started:
        process.communicate()  # the pipe's end, too


def _without_them(backend: Backend) -> str:
    """What has become of the jobs of workers that have ended."""
    alive = backend.list_workers(statuses=["starting", "active"])
    if any(not worker.id.startswith((SERVING_PREFIX, ANSWERING_PREFIX)) for worker in alive):
        return (
            "the workers of this command have ended, and another one of this machine goes on with "
            "the jobs; `ow ls` shows them, `ow cancel JOB` stops one"
        )
    return "the workers have ended with this command; run it again, and their jobs go on"


def own_threads(count: int) -> int:
    """Threads of each of so many processes that compute side by side."""
    return max(1, (os.cpu_count() or 1) // count)


def _await_workers(backend: Backend, count: int) -> None:
    """Until they have registered; else the client would start one of its own beside them."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if len(backend.list_workers(statuses=["active"])) >= count:
            return
        time.sleep(_POLL_S)


def _child_env(settings: Settings) -> dict[str, str]:
    env = settings.child_env()
    # The folder above the package first: the worker must be of this very version, installed or not.
    paths = [str(package_folder().parent), *env.get("PYTHONPATH", "").split(os.pathsep)]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    return env


def _start(
    settings: Settings,
    command: list[str],
    env: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    try:
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_log(settings) as log:
            return subprocess.Popen(
                command,
                cwd=settings.home,
                env=env,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise PlatformError(f"cannot start a worker: {error}") from error


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").rstrip()
    except OSError as error:
        return f"(it cannot be read: {error.strerror})"
