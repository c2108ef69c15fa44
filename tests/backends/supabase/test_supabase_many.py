"""Many workers over a bad network: every job runs once to its end; with controls that show that
the test would notice.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from openweights.backends.supabase.backend import SupabaseBackend
from openweights.errors import FencedError, StoreUnavailableError
from openweights.types import Claim, JobSpec, WorkerSpec
from tests.backends.steps import draft
from tests.supabase_double.team import Team

WORKERS = 32
DROPPED = 0.05
ZOMBIES = 0.1

Finish = Callable[[SupabaseBackend, Claim], object]


class Race:
    """Workers that take jobs until none is left."""

    def __init__(self, team: Team, jobs: int) -> None:
        self.team = team
        self.jobs = [f"job-{number:04}" for number in range(jobs)]
        self.ended: Counter[str] = Counter()
        self.fenced = 0
        self._lock = threading.Lock()
        with closing(team.backend()) as backend, ThreadPoolExecutor(4) as pool:
            specs = [JobSpec(job, "custom", "true", {}, max_attempts=100) for job in self.jobs]
            list(pool.map(backend.submit_job, specs))
        team.fault(drop_answers=DROPPED, forget=True)

    def run(self, work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(work, range(WORKERS)))
        self.team.fault(drop_answers=0.0)

    def work(self, number: int, finish: Finish | None = None) -> None:
        """Claim, report and finish; now and then, be silent for longer than the lease."""
        chance = random.Random(number)
        with closing(self.team.backend(patience_s=60.0)) as backend:
            worker = f"worker-{number}"
            backend.register_worker(WorkerSpec(worker))
            while (claim := backend.claim_job(worker)) is not None:
                backend.append_events(claim.run.id, [draft(by=number)])
                if chance.random() < ZOMBIES:
                    self.fall_silent(claim, number)
                self.end(backend, claim, finish)

    def fall_silent(self, claim: Claim, number: int) -> None:
        """The lease of the run ends, and another worker takes what it can get."""
        query = "update runs set lease_expires_at = now() - interval '1 s' where id = %s"
        self.team.execute(query, claim.run.id)
        with closing(self.team.backend(patience_s=60.0)) as backend:
            helper = f"helper-{number}-{claim.run.id}"
            backend.register_worker(WorkerSpec(helper))
            other = backend.claim_job(helper)
            if other is not None:
                self.end(backend, other, None)
            backend.set_worker_status(helper, "terminated")

    def end(self, backend: SupabaseBackend, claim: Claim, finish: Finish | None) -> None:
        try:
            if finish is None:
                backend.finish_run(claim.run.id, claim.run.attempt, "completed")
            else:
                finish(backend, claim)
        except FencedError:
            with self._lock:
                self.fenced += 1
            return
        with self._lock:
            self.ended[claim.job.id] += 1

    def completed_runs(self) -> Counter[str]:
        """How many runs of each job have completed, as the database has it."""
        query = "select job_id from runs where organization_id = %s and status = 'completed'"
        return Counter(job for (job,) in self.team.execute(query, self.team.organization_id))


def check_that_each_job_ran_once(team: Team, jobs: int) -> None:
    race = Race(team, jobs)
    race.run(race.work)
    once = Counter(race.jobs)
    assert race.ended == once and race.completed_runs() == once
    assert race.fenced > 0, "there were zombies, and each was refused"
    assert team.report()["dropped"] > jobs * DROPPED
    with closing(team.backend()) as backend:
        stored = backend.list_jobs(limit=None)
        assert {job.status for job in stored} == {"completed"} and len(stored) == jobs
        assert backend.list_runs(status="in_progress") == []
        # Several have taken part, and what each wrote is there once.
        events = [event for job in race.jobs[:50] for event in backend.list_events(job_id=job)]
        assert len({event.data["by"] for event in events}) > 1
        assert len({event.run_id for event in events}) == len(events)


def test_each_job_runs_once_to_its_end(team: Team) -> None:
    check_that_each_job_ran_once(team, 250)


@pytest.mark.slow
def test_each_of_3000_jobs_runs_once_to_its_end(team: Team) -> None:
    check_that_each_job_ran_once(team, 3000)


def test_control_zombies_that_are_not_fenced_end_jobs_twice(team: Team) -> None:
    def finish_unfenced(backend: SupabaseBackend, claim: Claim) -> None:
        run = backend.get_run(claim.run.id)
        if run.status == "in_progress":
            backend.finish_run(run.id, run.attempt, "completed")
        else:
            team.execute("update runs set status = 'completed' where id = %s", run.id)

    race = Race(team, 100)
    race.run(lambda number: race.work(number, finish_unfenced))
    assert max(race.completed_runs().values()) > 1 or max(race.ended.values()) > 1


def test_control_a_claim_under_a_new_name_loses_jobs(team: Team) -> None:
    """Workers that come back as somebody else after a lost answer: what they held is not done."""
    race = Race(team, 100)

    def work(number: int) -> None:
        names = (f"worker-{number}-{attempt}" for attempt in range(1000))
        with (
            closing(team.backend(patience_s=60.0)) as backend,
            closing(team.backend(patience_s=0.0)) as hasty,
        ):
            while True:
                name = next(names)
                backend.register_worker(WorkerSpec(name))
                try:
                    claim = hasty.claim_job(name)
                except StoreUnavailableError:
                    continue
                if claim is None:
                    return
                race.end(backend, claim, None)

    race.run(work)
    assert len(race.completed_runs()) < len(race.jobs)
