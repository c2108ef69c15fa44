"""What tests have other processes do with a store; light to import, because each of them does."""

from __future__ import annotations

import io
import resource
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from openweights.backends.local.backend import LocalBackend
from openweights.errors import OpenWeightsError
from openweights.types import JobSpec, WorkerSpec
from tests.waiting import HANGS_S

# Fresh processes, as in real use; a forked one would share what its parent has opened.
spawn = get_context("spawn")


def job(job_id: str) -> JobSpec:
    return JobSpec(job_id, "custom", "true", {"validated_params": {"name": job_id}})


def start_all(target: Any, home: Path, count: int) -> list[Any]:
    """Run `target(home, index, barrier, answers)` in `count` processes; what each answered."""
    barrier, answers = spawn.Barrier(count), spawn.Queue()
    processes = [
        spawn.Process(target=target, args=(home, index, barrier, answers), daemon=True)
        for index in range(count)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=HANGS_S) for _ in processes]
    for process in processes:
        process.join()
    return found


def start_one(target: Any, *args: Any) -> tuple[BaseProcess, Any]:
    """Run `target(*args, answers)` in a process and wait for its first answer."""
    answers = spawn.Queue()
    process = spawn.Process(target=target, args=(*args, answers), daemon=True)
    process.start()
    return process, answers.get(timeout=HANGS_S)


def open_new_store(home: Path, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    """Use a store that nobody has created yet, at the same moment as others."""
    with closing(LocalBackend(home)) as backend:
        barrier.wait()
        try:
            backend.submit_job(job("shared"))
            backend.submit_job(job(f"own-{index}"))
            answers.put(backend.put_file(io.BytesIO(b"same content"), "result", "f").id)
        except OpenWeightsError as error:
            answers.put(repr(error))


def hold_job(home: Path, has_child: bool, answers: Queue[Any]) -> None:
    """A worker that claims a job and then does nothing, perhaps with a child that does the same."""
    backend = LocalBackend(home)
    backend.register_worker(WorkerSpec("victim"))
    claim = backend.claim_job("victim")
    child = None
    if has_child:
        child = subprocess.Popen(["sleep", "60"], pass_fds=backend.liveness_fds).pid
    answers.put((claim.run.id if claim else None, child))
    time.sleep(60)


class _Stalling(io.RawIOBase):
    """A stream that stops in the middle."""

    def __init__(self, answers: Queue[Any]) -> None:
        self._answers = answers
        self._reads = 0

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if self._reads > 2:
            self._answers.put("half-way")
            time.sleep(60)
        return b"x" * size


def stall_in_upload(home: Path, answers: Queue[Any]) -> None:
    LocalBackend(home).put_file(_Stalling(answers), "result", "big")  # type: ignore[arg-type]


def fill_disk(home: Path, answers: Queue[Any]) -> None:
    """Write until files may not grow any more; answers what each verb raised."""
    backend = LocalBackend(home)
    backend.submit_job(job("before"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    raised: list[str] = []
    try:
        backend.put_file(io.BytesIO(b"x" * 300_000), "result", "big")
    except OpenWeightsError as error:
        raised.append(f"{type(error).__name__}: {error}")
    try:
        for index in range(1000):
            backend.submit_job(job(f"{index}-{'x' * 200}"))
    except OpenWeightsError as error:
        raised.append(f"{type(error).__name__}: {error}")
    answers.put((raised, [record.id for record in backend.list_jobs(limit=None)]))


def claim_all(home: Path, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    """Claim and complete jobs until none is left; answers the ids in the order of claiming."""
    claimed: list[str] = []
    with closing(LocalBackend(home)) as backend:
        worker_id = f"worker-{index}"
        backend.register_worker(WorkerSpec(worker_id))
        barrier.wait()
        while (claim := backend.claim_job(worker_id)) is not None:
            claimed.append(claim.job.id)
            backend.finish_run(claim.run.id, claim.run.attempt, "completed")
    answers.put(claimed)


def claim_all_racily(home: Path, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    """The control: look for a job, then take it, with nothing in between that keeps others out."""
    claimed: list[str] = []
    db = sqlite3.connect(home / "openweights.db", timeout=60, isolation_level=None)
    pending = "SELECT id FROM jobs WHERE status = 'pending' ORDER BY created_at LIMIT 1"
    barrier.wait()
    while (row := db.execute(pending).fetchone()) is not None:
        db.execute("UPDATE jobs SET status = 'in_progress' WHERE id = ?", row)
        claimed.append(row[0])
    db.close()
    answers.put(claimed)


USERS, USES, FILES = 3, 40, 2


def race_for_files(home: Path, collect: Any, count: int) -> list[str]:
    """What users missed of the files that they began to use, beside so many who collect garbage."""
    with closing(LocalBackend(home)) as backend:
        backend.list_jobs()  # makes the store
    return sum(start_all(_user_or_collector, (home, collect), USERS + count), [])  # type: ignore[arg-type]


def _user_or_collector(where: Any, index: int, barrier: Barrier, answers: Queue[Any]) -> None:
    home, collect = where
    with closing(LocalBackend(home)) as backend:
        barrier.wait()
        if index < USERS:
            answers.put(_use_files(backend, index))
            (home / f"user-{index}").touch()
            return
        while len(list(home.glob("user-*"))) < USERS:
            collect(backend)
    answers.put([])


def _use_files(backend: LocalBackend, index: int) -> list[str]:
    """Put files of one's own that are there and that nobody has needed for days, name and read
    them.
    """
    missed: list[str] = []
    for number in range(USES):
        content = f"content {number % FILES} of {index}".encode()
        file = backend.put_file(io.BytesIO(content), "conversations", "f")
        spec = job(f"job-{index}-{number}")
        backend.submit_job(replace(spec, params={"mounted_files": {"f": file.id}}))
        try:
            with backend.open_file(file.id) as stored:
                assert stored.read() == content
        except OpenWeightsError as error:
            missed.append(str(error))
        backend.cancel_job(spec.id)
        backend.delete_job(spec.id)
        with closing(sqlite3.connect(backend.home / "openweights.db", timeout=60)) as db, db:
            db.execute("UPDATE files SET used_at = 0, created_at = 0 WHERE id = ?", (file.id,))
    return missed


def collect(backend: LocalBackend) -> None:
    backend.collect_garbage(0)


def collect_racily(backend: LocalBackend) -> None:
    """The control: look for what nobody needs, then remove it, with nothing that keeps others out
    in between.
    """
    with closing(sqlite3.connect(backend.home / "openweights.db", timeout=60)) as db:
        named = "".join(params for (params,) in db.execute("SELECT params FROM jobs"))
        old = db.execute("SELECT id FROM files WHERE used_at = 0").fetchall()
        time.sleep(0.01)
        for (file_id,) in old:
            if file_id not in named:
                backend.delete_file(file_id)
