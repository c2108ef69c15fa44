"""How many claims a second the store on this machine serves: `python -m tests.benchmarks.claims`.

Each process registers workers, then claims one job for each of them as fast as it can, together
with the other processes; only that part is timed. A second line has finished jobs in the store, to
show that history costs nothing. The bar is 5,000 claims/s. On a machine that does other work as
well, look at the claims per second of CPU time, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from openweights.backends.local.backend import LocalBackend
from openweights.types import WorkerSpec
from tests.backends import processes

BAR = 5000
_FINISHED_JOBS = 100_000
_COLUMNS = (
    "id, type, script, params, docker_image, requires_vram_gb, priority, max_attempts, attempts, "
    "status, outputs, created_at, updated_at"
)


def _fill(home: Path, finished: int, pending: int) -> None:
    """Put jobs into the store by the thousand: what a claim costs is measured, not this."""
    with closing(LocalBackend(home)) as backend:
        backend.list_jobs()
    ended = (
        (f"old-{i}", "custom", "true", "{}", "", 0, 0, 3, 1, "completed", "{}", i, i)
        for i in range(finished)
    )
    waiting = (
        (f"job-{i}", "custom", "true", '{"a":1}', "", 0, 0, 3, 0, "pending", None, i, i)
        for i in range(finished, finished + pending)
    )
    db = sqlite3.connect(home / "openweights.db")
    with db:
        marks = ", ".join("?" * len(_COLUMNS.split(",")))
        db.executemany(
            f"INSERT INTO jobs ({_COLUMNS}) VALUES ({marks})", itertools.chain(ended, waiting)
        )
        db.execute(
            "INSERT INTO runs (job_id, attempt, status, created_at, ended_at) "
            "SELECT id, 1, 'completed', created_at, created_at FROM jobs WHERE attempts > 0"
        )
    db.close()


def claim_with_many_workers(
    home: Path, index: int, barrier: Barrier, answers: Queue[Any], claims: int
) -> None:
    """Answers when the claims began and ended, and the CPU time that they took."""
    with closing(LocalBackend(home)) as backend:
        workers = [f"worker-{index}-{number}" for number in range(claims)]
        for worker_id in workers:
            backend.register_worker(WorkerSpec(worker_id))
        barrier.wait()
        began, cpu = time.monotonic(), time.process_time()
        claimed = [backend.claim_job(worker_id) for worker_id in workers]
        answers.put((began, time.monotonic(), time.process_time() - cpu, claimed.count(None)))
        barrier.wait()  # a process that ends has its workers taken for dead


def _measure(count: int, finished: int, claims_each: int) -> tuple[float, float]:
    """Claims per second, and per second of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _fill(home, finished, count * claims_each)
        barrier, answers = processes.spawn.Barrier(count), processes.spawn.Queue()
        running = [
            processes.spawn.Process(
                target=claim_with_many_workers,
                args=(home, index, barrier, answers, claims_each),
                daemon=True,
            )
            for index in range(count)
        ]
        for process in running:
            process.start()
        began, ended, cpu, missed = zip(*(answers.get(timeout=300) for _ in running), strict=True)
        for process in running:
            process.join()
    if sum(missed):
        raise SystemExit(f"{sum(missed)} claims got no job although there were enough")
    claims = count * claims_each
    return claims / (max(ended) - min(began)), claims / sum(cpu)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=4000, help="in all, per measurement")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many counts")
    options = parser.parse_args()
    # Each worker holds one open file, its lock.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, bar {BAR:,} claims/s")
    worst = float("inf")
    for count, finished in itertools.product((1, 8), (0, _FINISHED_JOBS)):
        measured = [
            _measure(count, finished, options.claims // count) for _ in range(options.repeat)
        ]
        rate, per_cpu_s = max(measured)
        worst = min(worst, rate)
        print(
            f"{count} process(es), {finished:>7,} finished jobs: {rate:>7,.0f} claims/s, "
            f"{per_cpu_s:>7,.0f} per second of CPU"
        )
    return 0 if worst >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
