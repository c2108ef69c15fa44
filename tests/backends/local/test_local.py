"""The store on this machine: it keeps the contract, and what is particular to it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from openweights.backends.base import Backend
from openweights.backends.local.backend import LocalBackend
from openweights.backends.local.failures import clear_errors
from openweights.backends.local.worker_locks import WorkerLocks
from openweights.errors import (
    ConfigurationError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PlatformError,
    StoreUnavailableError,
)
from openweights.types import WorkerSpec
from tests.backends import processes
from tests.backends.contract import BackendContract
from tests.backends.steps import claim, draft, spec, start
from tests.waiting import has_ended, wait_until


class Clock:
    """Time that moves only when a test says so, and a microsecond at each look."""

    def __init__(self) -> None:
        self.moment = datetime.now(UTC)
        self.step = timedelta(microseconds=1)

    def __call__(self) -> datetime:
        self.moment += self.step
        return self.moment

    def steady(self) -> float:
        return self.moment.timestamp()


class TestLocalBackend(BackendContract):
    max_examples = 45

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def backend(self, tmp_path: Path, clock: Clock) -> Iterator[Backend]:
        self.time = clock
        options = {"lease_s": 10.0, "log_limit_bytes": 2 << 20, "steady": clock.steady}
        with closing(LocalBackend(tmp_path / "home", clock=clock, **options)) as backend:  # type: ignore[arg-type]
            yield backend

    def pass_time(self, backend: Backend, seconds: float) -> None:
        self.time.moment += timedelta(seconds=seconds)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "home"


@pytest.fixture
def backend(home: Path) -> Iterator[LocalBackend]:
    with closing(LocalBackend(home)) as backend:
        yield backend


def lock_files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "workers").iterdir())


def stored_files(home: Path) -> list[Path]:
    return [path for path in (home / "files").rglob("*") if path.is_file()]


def test_opening_touches_nothing_until_the_first_use(home: Path) -> None:
    backend = LocalBackend(home)
    assert (backend.liveness_fds, backend.organization_id) == ((), "local")
    assert (backend.lease_s, backend.heartbeat_s) == (60.0, 1.0)
    backend.close()
    assert not home.parent.exists()
    with pytest.raises(InvalidStateError, match="closed"):
        backend.list_jobs()
    with closing(LocalBackend(home)) as backend:
        assert backend.list_jobs() == []
    assert home.stat().st_mode & 0o077 == 0


def test_its_worker_takes_every_job(backend: LocalBackend) -> None:
    backend.register_worker(WorkerSpec("w1", docker_image="mine"))
    demanding = spec(
        docker_image="other",
        requires_vram_gb=640,
        allowed_hardware=("8x H200",),
        params={"cloud_type": "COMMUNITY"},
    )
    backend.submit_job(demanding)
    assert claim(backend).job.allowed_hardware == ("8x H200",)


def test_the_cost_of_a_claim_does_not_grow_with_the_store(backend: LocalBackend) -> None:
    """Counts steps of SQLite's machine, which are the same on every computer."""

    def steps_of_a_claim() -> int:
        for name in "ab":
            backend.submit_job(spec(f"{name}-{len(backend.list_jobs(limit=None))}"))
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        with backend._connections.use() as db:  # noqa: SLF001 - nothing public shows the steps
            db.set_progress_handler(count, 1)
        held = claim(backend)
        with backend._connections.use() as db:  # noqa: SLF001
            db.set_progress_handler(None, 0)
        backend.finish_run(held.run.id, held.run.attempt, "completed")
        return steps

    backend.register_worker(WorkerSpec("w1"))
    few = steps_of_a_claim()
    for index in range(400):
        backend.submit_job(spec(f"old-{index}", priority=9))
        held = claim(backend)
        backend.finish_run(held.run.id, held.run.attempt, "completed")
    for index in range(400):
        backend.submit_job(spec(f"waiting-{index}"))
    assert steps_of_a_claim() < few * 1.2


# ---- liveness


def test_a_killed_worker_is_noticed_at_once(home: Path, backend: LocalBackend) -> None:
    backend.submit_job(processes.job("job-1"))
    process, (run_id, _) = processes.start_one(processes.hold_job, home, False)
    assert [w.status for w in backend.list_workers()] == ["active"]
    assert lock_files(home) == ["victim.lock"]
    process.kill()
    process.join()
    assert [w.status for w in backend.list_workers()] == ["terminated"]
    lost = backend.get_run(run_id)
    assert lost.status == "failed" and lost.error == "worker victim is gone"
    assert backend.get_job("job-1").status == "pending"
    assert lock_files(home) == []


def test_a_claim_notices_a_killed_worker_by_itself(home: Path, backend: LocalBackend) -> None:
    backend.submit_job(processes.job("job-1"))
    process, _ = processes.start_one(processes.hold_job, home, False)
    backend.register_worker(WorkerSpec("w1"))
    assert backend.claim_job("w1") is None
    process.kill()
    process.join()
    started = time.monotonic()
    while (held := backend.claim_job("w1")) is None:
        time.sleep(0.02)
    assert time.monotonic() - started < backend.lease_s / 2
    assert (held.job.id, held.run.attempt) == ("job-1", 2)


def test_a_worker_lives_as_long_as_its_children(home: Path, backend: LocalBackend) -> None:
    backend.submit_job(processes.job("job-1"))
    backend.register_worker(WorkerSpec("w1"))
    process, (_, child) = processes.start_one(processes.hold_job, home, True)
    try:
        process.kill()
        process.join()
        time.sleep(0.3)
        assert backend.claim_job("w1") is None
        assert {w.id: w.status for w in backend.list_workers()}["victim"] == "active"
        with pytest.raises(InvalidStateError, match="victim.*alive"):
            backend.register_worker(WorkerSpec("victim"))
    finally:
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: has_ended(child))
    assert {w.id: w.status for w in backend.list_workers()}["victim"] == "terminated"
    assert claim(backend).job.id == "job-1"


def test_locks_end_with_their_worker(home: Path, backend: LocalBackend) -> None:
    for name in ("w1", "w2", "w3"):
        backend.register_worker(WorkerSpec(name))
        backend.register_worker(WorkerSpec(name))
    assert len(set(backend.liveness_fds)) == 3
    assert all(os.get_inheritable(fd) for fd in backend.liveness_fds)
    backend.set_worker_status("w1", "terminated")
    assert lock_files(home) == ["w2.lock", "w3.lock"]
    with closing(LocalBackend(home)) as other:
        other.set_worker_status("w2", "terminated")  # by another, while it lives
        with pytest.raises(InvalidStateError, match="w2.*alive"):
            other.register_worker(WorkerSpec("w2"))
        backend.close()
        assert [w.status for w in other.list_workers()] == ["terminated"] * 3
    with closing(LocalBackend(home)) as other:
        other.register_worker(WorkerSpec("w4"))  # tidies up after those before it
        assert lock_files(home) == ["w4.lock"]
        for bad in ("../w", "a/b", "", ".w"):
            with pytest.raises(InvalidInputError, match="worker's id"):
                other.register_worker(WorkerSpec(bad))


def test_only_one_holds_a_lock_although_its_file_comes_and_goes(tmp_path: Path) -> None:
    holders: list[int] = []
    most = 0
    taken = 0

    def take_often(name: int) -> None:
        nonlocal most, taken
        locks = WorkerLocks(tmp_path)
        for _ in range(60):
            with suppress(InvalidStateError):
                locks.take("w1")
                holders.append(name)
                most = max(most, len(holders))
                time.sleep(0.0005)
                holders.remove(name)
                taken += 1
                locks.release("w1")

    threads = [threading.Thread(target=take_often, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, list(tmp_path.iterdir())) == (1, [])
    assert taken > 60


# ---- several processes, threads, forks


def test_processes_may_open_a_new_store_at_the_same_moment(home: Path) -> None:
    answers = processes.start_all(processes.open_new_store, home, 4)
    assert len(set(answers)) == 1 and answers[0].startswith("result:file-")
    with closing(LocalBackend(home)) as backend:
        ids = {job.id for job in backend.list_jobs()}
        assert ids == {"shared", "own-0", "own-1", "own-2", "own-3"}
        assert len(backend.list_files()) == 1 == len(stored_files(home))


def test_threads_share_one_object_and_leave_nothing_open(backend: LocalBackend) -> None:
    backend.register_worker(WorkerSpec("w1"))
    backend.submit_job(spec())
    run_id = claim(backend).run.id
    failures: list[BaseException] = []

    def use(name: int) -> None:
        try:
            for index in range(20):
                backend.append_events(run_id, [draft(thread=name, index=index)])
                assert backend.heartbeat("w1", run_id) == "continue"
                backend.latest_values(run_id=run_id)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    def use_in_threads() -> int:
        threads = [threading.Thread(target=use, args=(name,)) for name in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return psutil.Process().num_fds()

    open_after = [use_in_threads() for _ in range(8)]
    assert failures == []
    # A connection has up to three files, and is closed when a later thread needs one.
    assert max(open_after) < open_after[0] + 2 * 6 * 3
    assert len(list(backend.list_events(run_id=run_id))) == 8 * 6 * 20


def test_forked_processes_use_the_same_object(home: Path, backend: LocalBackend) -> None:
    """Also while another thread writes, and when the parent closes the store before the child."""
    backend.submit_job(spec("before"))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            backend.set_timeout("before", datetime.now(UTC))

    thread = threading.Thread(target=write)
    thread.start()
    go, done = os.pipe()
    children: list[int] = []
    for index in range(5):
        child = os.fork()
        if child == 0:
            try:
                backend.submit_job(spec(f"early-{index}"))
                os.close(done)
                os.read(go, 1)  # until the parent has closed everything
                backend.submit_job(spec(f"late-{index}"))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    stop.set()
    thread.join()
    while len(backend.list_jobs()) < 6:
        time.sleep(0.01)
    backend.close()
    os.close(done)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(go)
    assert codes == [0] * 5
    with closing(LocalBackend(home)) as again:
        expected = {"before", *(f"{when}-{i}" for when in ("early", "late") for i in range(5))}
        assert {job.id for job in again.list_jobs()} == expected
    db = sqlite3.connect(home / "openweights.db")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


# ---- files


def test_a_crash_leaves_no_half_file(home: Path, backend: LocalBackend) -> None:
    process, answer = processes.start_one(processes.stall_in_upload, home)
    assert answer == "half-way"
    process.kill()
    process.join()
    assert backend.list_files() == []
    (rest,) = stored_files(home)
    assert rest.parent.name == "incoming"
    backend.register_worker(WorkerSpec("w1"))
    assert rest.exists()  # it could still be on its way
    long_ago = time.time() - 90_000
    os.utime(rest, (long_ago, long_ago))
    with closing(LocalBackend(home)) as later:
        later.register_worker(WorkerSpec("w2"))
    assert stored_files(home) == []


def test_content_that_was_lost_is_reported_and_comes_back(
    home: Path, backend: LocalBackend
) -> None:
    file = backend.put_file(io.BytesIO(b"abc"), "result", "/secret/place/f")
    (path,) = stored_files(home)
    assert path.relative_to(home).parts == (
        "files",
        file.id.split("-")[1][:2],
        file.id.replace(":", "_"),
    )
    path.unlink()
    with pytest.raises(NotFoundError, match="upload it again"):
        backend.open_file(file.id)
    assert backend.put_file(io.BytesIO(b"abc"), "result", "f") == file
    assert stored_files(home) == [path]
    backend.close()
    assert not any(b"/secret/place" in p.read_bytes() for p in home.rglob("*") if p.is_file())


def test_organizations_do_not_share_file_ids(home: Path, backend: LocalBackend) -> None:
    with closing(LocalBackend(home, organization_id="other")) as other:
        ids = {b.put_file(io.BytesIO(b"abc"), "result", "f").id for b in (backend, other)}
    assert len(ids) == 2


# ---- what can go wrong with the place


def test_a_home_that_was_deleted_is_made_anew(home: Path, backend: LocalBackend) -> None:
    backend.register_worker(WorkerSpec("w1"))
    backend.submit_job(spec("before"))
    shutil.rmtree(home)
    backend.register_worker(WorkerSpec("w1"))
    backend.submit_job(spec("after"))
    backend.put_file(io.BytesIO(b"abc"), "result", "f")
    with closing(LocalBackend(home)) as other:
        assert [job.id for job in other.list_jobs()] == ["after"]
        assert [worker.status for worker in other.list_workers()] == ["active"]
    assert claim(backend).job.id == "after"


def test_a_home_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "home" / "openweights.db").mkdir(parents=True)
    for place in ("file", "file/below", "home"):
        with closing(LocalBackend(tmp_path / place)) as backend:
            with pytest.raises(ConfigurationError, match="OPENWEIGHTS_HOME"):
                backend.list_jobs()
            with pytest.raises(ConfigurationError, match="OPENWEIGHTS_HOME"):
                backend.put_file(io.BytesIO(b""), "result", "f")


def test_a_home_that_cannot_be_made() -> None:
    told = pytest.raises(StoreUnavailableError, match="set OPENWEIGHTS_HOME to another one")
    with closing(LocalBackend(Path("/proc/nope"))) as backend, told:
        backend.list_jobs()


def test_a_damaged_database(home: Path, backend: LocalBackend) -> None:
    for index in range(200):
        backend.submit_job(spec(f"job-{index}", script="x" * 500))
    backend.close()
    path = home / "openweights.db"
    whole = path.read_bytes()
    for content in (b"no database at all" * 100, whole[:8192] + b"\xff" * (len(whole) - 8192)):
        path.write_bytes(content)
        with closing(LocalBackend(home)) as damaged:
            with pytest.raises(PlatformError, match="damaged.*backup") as caught:
                damaged.list_jobs(limit=None)
            assert not isinstance(caught.value, StoreUnavailableError)  # no use in trying again


def test_a_database_of_a_newer_version(home: Path, backend: LocalBackend) -> None:
    backend.submit_job(spec())
    backend.close()
    db = sqlite3.connect(home / "openweights.db")
    db.execute("PRAGMA user_version = 999")
    db.close()
    refused = pytest.raises(ConfigurationError, match="newer openweights.*999.*upgrade")
    with closing(LocalBackend(home)) as old, refused:
        old.list_jobs()


def test_a_full_disk(home: Path) -> None:
    process, (raised, jobs) = processes.start_one(processes.fill_disk, home)
    process.join()
    assert len(raised) == 2
    assert raised[0].startswith("StoreUnavailableError: no space left")
    assert raised[1].startswith("StoreUnavailableError: ") and "space" in raised[1]
    assert "before" in jobs  # still readable
    assert all(path.parent.name != "incoming" for path in stored_files(home))
    with closing(LocalBackend(home)) as backend:
        assert {job.id for job in backend.list_jobs(limit=None)} == set(jobs)
        backend.submit_job(spec("after"))


def test_a_store_that_is_busy_for_too_long(home: Path, backend: LocalBackend) -> None:
    backend.submit_job(spec())
    writer = sqlite3.connect(home / "openweights.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    impatient = sqlite3.connect(home / "openweights.db", isolation_level=None, timeout=0.01)
    with pytest.raises(StoreUnavailableError, match="busy.*try again"), clear_errors(home):
        impatient.execute("BEGIN IMMEDIATE")
    # Reading goes on meanwhile.
    assert backend.get_job("job-1").status == "pending"
    writer.execute("ROLLBACK")
    for db in (writer, impatient):
        db.close()


@pytest.mark.parametrize("is_there", [False, True], ids=["new home", "a home that is there"])
def test_a_new_store_is_its_owners_alone(home: Path, is_there: bool) -> None:
    umask = os.umask(0)
    try:
        if is_there:
            home.mkdir(parents=True)
        with closing(LocalBackend(home)) as backend:
            backend.submit_job(spec())
            for path in (home, *home.rglob("*")):
                assert path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(umask)


class _SetClock(Clock):
    """A clock that is set while no time passes, or goes on as time does."""

    def __init__(self, *, is_set: bool) -> None:
        super().__init__()
        self.is_set, self.passed = is_set, 0.0

    def jump(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        self.passed += 0.0 if self.is_set else seconds

    def steady(self) -> float:
        return self.passed


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "control: time passes"])
@pytest.mark.parametrize(
    ("limit", "verdict"), [("stall_timeout_s", "stalled"), ("max_duration_s", "timeout")]
)
def test_a_clock_that_is_set_ends_no_run(
    home: Path, limit: str, verdict: str, is_set: bool
) -> None:
    """As when a notebook has slept. Backwards, it gives a run no more time either."""
    clock = _SetClock(is_set=is_set)
    with closing(LocalBackend(home, clock=clock, steady=clock.steady)) as backend:
        limits: dict[str, Any] = {limit: 60.0}
        claimed = start(backend, **limits)
        asked = "w1", claimed.run.id
        assert backend.heartbeat(*asked) == "continue"
        clock.jump(3600.0)
        assert backend.heartbeat(*asked) == ("continue" if is_set else verdict)
        if is_set:
            clock.jump(-7200.0)
            assert backend.heartbeat(*asked) == "continue"
            clock.is_set = False
            clock.jump(61.0)
            assert backend.heartbeat(*asked) == verdict
