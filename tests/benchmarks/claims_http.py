"""How many jobs a second workers take from a Supabase project over HTTP:
`python -m tests.benchmarks.claims_http`.

Each worker registers, then claims a job and completes it until none is left, with the real client,
against the double of `tests/supabase_double` and a real PostgreSQL. A claim's time is what the
worker waits. The double is one Python process and takes most of the time; what the database itself
can do is measured by `claims_sql`. The last line has finished jobs in the table, to show that
history costs nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from multiprocessing.queues import Queue
from typing import Any

from openweights.backends.supabase.backend import SupabaseBackend
from openweights.types import JobSpec, WorkerSpec
from tests.backends.processes import spawn
from tests.supabase_double.postgres import running_server
from tests.supabase_double.server import ANON_KEY
from tests.supabase_double.team import Team, running_double

_WORKERS_PER_PROCESS = 8
_HISTORY = 100_000


def _work(url: str, key: str, names: list[str], ready: Any, answers: Queue[Any]) -> None:
    """Answers when the first claim began and the last job ended, and how long each claim took."""
    times: list[float] = []
    lock = threading.Lock()

    def worker(backend: SupabaseBackend, name: str) -> None:
        while True:
            began = time.monotonic()
            claim = backend.claim_job(name)
            if claim is None:
                return
            with lock:
                times.append(time.monotonic() - began)
            backend.finish_run(claim.run.id, claim.run.attempt, "completed")

    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        backends = [
            stack.enter_context(closing(SupabaseBackend(url, ANON_KEY, key))) for _ in names
        ]
        for backend, name in zip(backends, names, strict=True):
            backend.register_worker(WorkerSpec(name))
        ready.wait()
        began = time.monotonic()
        list(pool.map(worker, backends, names))
        answers.put((began, time.monotonic(), times))


def _measure(team: Team, workers: int, jobs: int) -> str:
    with closing(team.backend()) as backend, ThreadPoolExecutor(8) as pool:
        specs = [JobSpec(f"job-{workers}-{n}", "custom", "true", {"a": 1}) for n in range(jobs)]
        list(pool.map(backend.submit_job, specs))
    names = [f"worker-{workers}-{number}" for number in range(workers)]
    shares = [
        names[first : first + _WORKERS_PER_PROCESS]
        for first in range(0, workers, _WORKERS_PER_PROCESS)
    ]
    ready, answers = spawn.Barrier(len(shares)), spawn.Queue()
    running = [
        spawn.Process(target=_work, args=(team.url, team.admin_key, share, ready, answers))
        for share in shares
    ]
    for process in running:
        process.start()
    found = [answers.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    times = sorted(took for _, _, claims in found for took in claims)
    if len(times) != jobs:
        raise SystemExit(f"{len(times)} claims for {jobs} jobs")
    seconds = max(ended for _, ended, _ in found) - min(began for began, _, _ in found)
    p99 = times[int(len(times) * 0.99)]
    return (
        f"{jobs / seconds:>6,.0f} jobs claimed and completed a second, "
        f"claim p50 {statistics.median(times) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"
    )


def _fill(team: Team, count: int) -> None:
    team.execute(
        "insert into jobs (organization_id, id, type, script, params, status, submitted_by_key, "
        "attempts, outputs) select organization_id, 'old-' || n, 'custom', 'true', '{}', "
        "'completed', id, 1, '{}' from api_keys, generate_series(1, %s) n "
        "where organization_id = %s",
        *(count, team.organization_id),
    )
    team.execute(
        "insert into runs (organization_id, job_id, attempt, status, ended_at) "
        "select organization_id, id, 1, 'completed', now() from jobs where attempts = 1 "
        "and organization_id = %s and id like 'old-%%'",
        team.organization_id,
    )
    team.execute("analyze")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="per measurement")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    with (
        running_server() as postgres,
        running_double(postgres) as url,
        closing(Team(postgres.create_project(), url)) as team,
    ):
        for workers in (1, 8, 32):
            print(f"{workers:>2} workers: {_measure(team, workers, options.jobs)}", flush=True)
    with (
        running_server() as postgres,
        running_double(postgres) as url,
        closing(Team(postgres.create_project(), url)) as team,
    ):
        _fill(team, _HISTORY)
        print(f" 8 workers, {_HISTORY:,} finished jobs: {_measure(team, 8, options.jobs)}")


if __name__ == "__main__":
    main()
