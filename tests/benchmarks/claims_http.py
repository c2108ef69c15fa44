"""How many jobs a second workers take from a Supabase project over HTTP:
`python -m tests.benchmarks.claims_http`.

Each worker registers, then claims a job and completes it until none is left, with the real client,
against the double of `tests/supabase_double` and a real PostgreSQL. A claim's time is what the
worker waits. The double is one Python process and takes most of the time; what the database itself
can do is measured by `claims_postgres`. The last line of these has finished jobs in the table, to
show that history costs nothing.

Then what clients and workers wait for where 10,000 jobs are pending, beside 10: jobs that may run,
and jobs that all wait for another one, or for one of their label to end; `--queue` for that alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from multiprocessing.queues import Queue
from typing import Any

from openweights.backends.supabase.backend import SupabaseBackend
from openweights.client.watching.waiting import state_of, states_of
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


# Which jobs wait: `after`, `label` and `max_running` of each.
_QUEUES = {
    "that may run": "null, null, null",
    "that wait for another": "array['first'], null, null",
    "of a label that is full": "null, 'full', 1",
}
_ROUNDS = 7


def _fill_queue(team: Team, count: int, columns: str) -> None:
    team.execute(
        "insert into jobs (organization_id, id, type, script, params, status, submitted_by_key, "
        "created_at, after, label, max_running) select organization_id, 'wait-' || n, 'custom', "
        "'true', '{\"validated_params\": {}}', 'pending', id, now() - n * interval '1 ms', "
        f"{columns} from api_keys, generate_series(1, %s) n where organization_id = %s",
        *(count, team.organization_id),
    )
    team.execute("analyze")


def _measure_queue(team: Team, count: int, columns: str) -> str:
    """What is waited for beside so many pending jobs of a sort: medians."""
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        answer = call()
        times.setdefault(name, []).append((time.monotonic() - began) * 1e3)
        return answer

    with closing(team.backend()) as backend:
        backend.submit_job(JobSpec("first", "custom", "true", {}, label="full"))
        for worker in ("holder", "w"):
            backend.register_worker(WorkerSpec(worker))
        backend.claim_job("holder")
        _fill_queue(team, count, columns)
        last = backend.get_job("wait-1")
        for number in range(_ROUNDS):
            spec = JobSpec(f"new-{number}", "custom", "true", {}, priority=-1)
            timed("create", lambda: backend.submit_job(spec))  # noqa: B023
            claim = timed("claim", lambda: backend.claim_job("w"))
            backend.finish_run(claim.run.id, claim.run.attempt, "completed")
            timed("show, wait", lambda: state_of(backend, last, is_remote=True))
            jobs = timed("list 100", lambda: backend.list_jobs(limit=100))
            timed("ls", lambda: states_of(backend, jobs, is_remote=True))  # noqa: B023
    figures = (f"{name} {statistics.median(each):.1f} ms" for name, each in times.items())
    return ", ".join(figures)


def _queues() -> None:
    with running_server() as postgres, running_double(postgres) as url:
        for name, columns in _QUEUES.items():
            for count in (10, 10_000):
                with closing(Team(postgres.create_project(), url)) as team:
                    found = _measure_queue(team, count, columns)
                print(f"{count:>6,} pending jobs {name}: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="per measurement")
    parser.add_argument("--queue", action="store_true", help="the long queues alone")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    if not options.queue:
        _claims(options.jobs)
    _queues()


def _claims(jobs: int) -> None:
    with (
        running_server() as postgres,
        running_double(postgres) as url,
        closing(Team(postgres.create_project(), url)) as team,
    ):
        for workers in (1, 8, 32):
            print(f"{workers:>2} workers: {_measure(team, workers, jobs)}", flush=True)
    with (
        running_server() as postgres,
        running_double(postgres) as url,
        closing(Team(postgres.create_project(), url)) as team,
    ):
        _fill(team, _HISTORY)
        print(f" 8 workers, {_HISTORY:,} finished jobs: {_measure(team, 8, jobs)}")


if __name__ == "__main__":
    main()
