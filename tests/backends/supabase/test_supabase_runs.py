"""Long runs in a Supabase project: many events, the price of logging, a network that goes away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import pytest

from openweights import OpenWeights, hardware
from openweights.backends import open_backend
from openweights.backends.supabase.backend import SupabaseBackend
from openweights.types import JobSpec
from tests.backends.steps import draft, start
from tests.supabase_double.team import ROOT, Team
from tests.waiting import wait_until
from tests.worker.harness import WorkerThread

BATCH = 500


@pytest.fixture
def backend(team: Team) -> Iterator[SupabaseBackend]:
    with closing(team.backend()) as backend:
        yield backend


def test_a_long_run_lists_completely(backend: SupabaseBackend) -> None:
    count = 50_000
    held = start(backend)
    for first in range(0, count, BATCH):
        drafts = [draft(step=n, loss=n / 2) for n in range(first, first + BATCH)]
        backend.append_events(held.run.id, drafts)
    backend.append_events(held.run.id, [draft(note="last", loss=None)])
    steps = [event.data.get("step") for event in backend.list_events(run_id=held.run.id)]
    assert steps == [*range(count), None]
    latest = {"step": count - 1, "loss": None, "note": "last"}
    assert backend.latest_values(job_id="job-1") == latest
    assert backend.finish_run(held.run.id, 1, "completed").outputs == latest


def test_logging_every_step_costs_a_request_a_second(
    team: Team, backend: SupabaseBackend, tmp_path: Path
) -> None:
    held = start(backend)
    ow = OpenWeights(settings=team.settings(tmp_path, run_id=held.run.id))
    team.fault(forget=True)
    began = time.monotonic()
    logged = 0
    while time.monotonic() - began < 4:
        ow.run.log({"step": logged, "loss": 0.5})
        logged += 1
        time.sleep(0.005)
    during = team.moments_of("rpc/append_events")
    assert 2 <= len(during) <= time.monotonic() - began + 1
    assert min(later - earlier for earlier, later in pairwise(during)) > 0.9
    # The end of the run does not wait for the next second.
    closing_at = time.monotonic()
    ow.close()
    assert time.monotonic() - closing_at < 1.0
    events = [event.data["step"] for event in backend.list_events(run_id=held.run.id)]
    assert events == list(range(logged)) and logged > 100


# A trainer that logs each step, and writes down on this disk where it is.
TRAINER = """
import sys, time
from openweights import OpenWeights
run = OpenWeights().run
for step in range({steps}):
    run.log({{"step": step}})
    open({progress!r}, "a").write(".")
    time.sleep({step_s})
"""


class Trainer:
    """A job whose every step can be seen, here and in the store."""

    def __init__(self, folder: Path, steps: int, step_s: float) -> None:
        self._progress = folder / "progress"
        code = TRAINER.format(steps=steps, step_s=step_s, progress=str(self._progress))
        (folder / "train.py").write_text(code)
        script = f"PYTHONPATH={ROOT} python {folder / 'train.py'}"
        self.spec = JobSpec("job-1", "custom", script, {"validated_params": {}})

    def step(self) -> int:
        return self._progress.stat().st_size - 1 if self._progress.exists() else -1


def check_outage(team: Team, home: Path, *, outage_s: float, steps: int, step_s: float) -> None:
    trainer = Trainer(home.parent, steps, step_s)
    settings = team.settings(home, cancel_grace_s=1.0)
    with (
        closing(open_backend(settings)) as backend,
        WorkerThread(settings, open_backend(settings), hardware.CPU),
    ):
        backend.submit_job(trainer.spec)
        (run,) = wait_until(lambda: backend.list_runs(job_id="job-1"))
        wait_until(lambda: list(backend.list_events(run_id=run.id)))
        team.fault(is_down=True)
        before = trainer.step()
        time.sleep(outage_s)
        during = trainer.step()
        team.fault(is_down=False)
        assert during - before > outage_s / step_s / 4, "training goes on meanwhile"
        assert during < steps - 1, "the outage was in the middle"
        ends = lambda: backend.get_job("job-1").status not in ("pending", "in_progress")  # noqa: E731
        wait_until(ends)
        job = backend.get_job("job-1")
        assert (job.status, job.attempts, job.outputs) == ("completed", 1, {"step": steps - 1})
        found = [event.data["step"] for event in backend.list_events(run_id=run.id)]
        assert found == list(range(steps))


def test_a_run_survives_a_network_that_goes_away(team: Team, home: Path) -> None:
    team.set_timing(lease_s=1.0, heartbeat_s=0.2)
    check_outage(team, home, outage_s=2.0, steps=250, step_s=0.02)


@pytest.mark.slow
def test_a_run_survives_two_minutes_without_a_network(team: Team, home: Path) -> None:
    check_outage(team, home, outage_s=120.0, steps=3000, step_s=0.05)


def test_a_run_that_was_taken_over_meanwhile_is_fenced(team: Team, home: Path) -> None:
    team.set_timing(lease_s=1.5, heartbeat_s=0.3)
    again = home.parent / "again"
    script = f"test -e {again} && exit 0; touch {again}; sleep 9999"
    keys = [team.key("worker"), team.key("worker")]
    with ExitStack() as stack:
        backend = stack.enter_context(closing(team.backend()))
        backend.submit_job(JobSpec("job-1", "custom", script, {"validated_params": {}}))
        workers: list[WorkerThread] = []
        for key in keys:
            settings = team.settings(home, key, cancel_grace_s=1.0)
            worker = WorkerThread(settings, open_backend(settings), hardware.CPU)
            workers.append(stack.enter_context(worker))
            wait_until(again.exists)
        (first,) = backend.list_runs(job_id="job-1")
        assert first.worker_id == workers[0].worker.id
        team.fault(down_for=keys[0])
        wait_until(lambda: backend.get_job("job-1").status == "completed")
        assert [run.worker_id for run in backend.list_runs(job_id="job-1")] == [
            worker.worker.id for worker in workers
        ]
        team.fault(down_for=None)
        # The first one hears of it, stops what it runs, and is free for other jobs.
        backend.set_worker_status(workers[1].worker.id, "shutdown")
        backend.submit_job(JobSpec("job-2", "custom", "true", {"validated_params": {}}))
        wait_until(lambda: backend.get_job("job-2").status == "completed")
        assert [run.attempt for run in backend.list_runs(job_id="job-1")] == [1, 2]
