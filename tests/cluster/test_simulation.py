"""A day with 5,000 jobs: nothing lost, nothing forgotten, nothing paid for in vain."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.observation import Demand
from openweights.gpu_catalogue import CATALOGUE
from openweights.types import CloudType
from tests.cluster.simulation import START, Day, Job

JOBS = 5000
LIMITS = Limits(max_workers=60)
KINDS: tuple[tuple[str, CloudType, int, tuple[str, ...] | None, int], ...] = (
    # image, cloud type, memory, hardware, weight
    ("train:1", "SECURE", 24, None, 40),
    ("train:1", "COMMUNITY", 40, None, 25),
    ("train:1", "ALL", 70, None, 20),
    ("serve:1", "SECURE", 70, ("1x H100S",), 10),
    ("train:1", "ALL", 150, None, 4),
    ("rare:1", "SECURE", 0, None, 1),
)


def jobs_of_a_day(chance: random.Random, count: int, hours: float) -> list[Job]:
    """Two owners send a few at a time; a third sends a tenth of all at once."""
    jobs: list[Job] = []
    for number in range(count):
        image, cloud_type, vram_gb, hardware, _ = chance.choices(
            KINDS, weights=[kind[-1] for kind in KINDS]
        )[0]
        is_burst = number % 10 == 0
        at = START + timedelta(hours=6 if is_burst else chance.uniform(0, hours))
        owner = "eve" if is_burst else chance.choice(("ann", "bob"))
        priority = chance.choice((0, 0, 0, 1))
        demand = Demand(f"job-{number}", image, at, cloud_type, vram_gb, hardware, priority, owner)
        work_s = 60.0 * chance.choice((2, 4, 6, 10, 30))
        jobs.append(Job(demand, at, work_s, work_s))
    return jobs


def waited_s(job: Job) -> float:
    assert job.started_at is not None
    return (job.started_at - job.arrives_at).total_seconds()


def least_usd(day: Day) -> float:
    """The work alone, on the cheapest pods that the catalogue has for it. (Prices go up and down by
    the same factors.)
    """
    total = 0.0
    for job in day.jobs:
        demand = job.demand
        rates: list[float] = []
        for gpu in CATALOGUE.values():
            secure, community = gpu.secure_usd, gpu.community_usd
            allowed = {"SECURE": (secure,), "COMMUNITY": (community,), "ALL": (secure, community)}
            named = demand.allowed_hardware in (None, (f"1x {gpu.key}",))
            if not named or not (gpu.is_automatic or demand.allowed_hardware):
                continue
            count = 1 if gpu.vram_gb - 5 >= demand.requires_vram_gb else 2
            if count * (gpu.vram_gb - 5) >= demand.requires_vram_gb:
                rates += [count * p for p in allowed[demand.cloud_type] if p is not None]
        total += min(rates) * job.work_s / 3600
    return total


@pytest.fixture(scope="module")
def day() -> Day:
    chance = random.Random(20261122)
    day = Day(jobs_of_a_day(chance, JOBS, 24), LIMITS, chance)
    day.run(most_hours=48)
    return day


def test_no_job_is_lost_and_none_runs_twice(day: Day) -> None:
    assert [job.demand.id for job in day.jobs if job.completions != 1] == []
    assert day.counts["lost"] > 50, "the control: machines did die"


def test_no_worker_in_good_health_is_given_up(day: Day) -> None:
    assert day.counts["killed in good health"] == 0
    assert day.counts["heartbeats lost"] > 50, "the control"


def test_the_limit_holds_all_day(day: Day) -> None:
    assert 20 < day.most_pods <= LIMITS.max_workers
    assert day.machines == {}, "and in the end nothing runs"


def test_no_worker_is_idle_for_long(day: Day) -> None:
    # One with a job reserved for it is given as long again to take it.
    assert 0 < day.most_idle_s <= 2 * LIMITS.idle_s


def test_waits_are_bounded(day: Day) -> None:
    waits = sorted(waited_s(job) for job in day.jobs)
    # The 500 jobs that come at once are 75 hours of work for 60 workers that others want, too.
    assert waits[len(waits) // 2] < 300
    assert waits[-1] < 3 * 3600


def test_it_costs_little_more_than_the_work(day: Day) -> None:
    # Small jobs may run on large pods that are there anyway; pods boot, wait, and die.
    assert least_usd(day) < day.usd
    assert day.usd < 2 * least_usd(day)


@pytest.mark.parametrize("seed", range(8))
def test_small_clusters_on_bad_days(seed: int) -> None:
    chance = random.Random(seed)
    limits = Limits(max_workers=chance.randint(1, 4))
    day = Day(jobs_of_a_day(chance, 60, 8), limits, chance)
    day.run(most_hours=96)
    assert [job.demand.id for job in day.jobs if job.completions != 1] == []
    assert day.most_pods <= limits.max_workers
    assert day.counts["killed in good health"] == 0
    assert day.machines == {}


def longest_wait_h(limits: Limits) -> float:
    """Of the few jobs of one group, beside another one that has work for three pods all day."""
    chance = random.Random(1)
    jobs: list[Job] = []
    for number in range(430):
        is_few = number % 43 == 42
        at = START + timedelta(minutes=20 + number * 2.5) if is_few else START
        image = "few:1" if is_few else "many:1"
        demand = Demand(f"job-{number}", image, at, "SECURE", 40)
        jobs.append(Job(demand, at, 600, 600))
    day = Day(jobs, limits, chance)
    day.run(most_hours=96)
    few = [job for job in jobs if job.demand.docker_image == "few:1"]
    return max(waited_s(job) / 3600 for job in few)


def test_a_small_group_is_not_shut_out_by_a_large_one() -> None:
    assert longest_wait_h(Limits(max_workers=3)) < 1
    assert longest_wait_h(Limits(max_workers=3, rotate_s=1e9)) > 5, "the control"


def test_workers_that_cannot_take_their_jobs_are_not_rented_without_end() -> None:
    demand = Demand("job-0", "broken:1", START, "SECURE", 40)
    job = Job(demand, START, 600, 600)
    day = Day([job], Limits(), random.Random(3), broken_image="broken:1", restarts=0)
    day.run(most_hours=24)
    assert job.completions == 0
    assert 3 <= day.counts["rows"] < 30
    fine = Day([Job(demand, START, 600, 600)], Limits(), random.Random(3))
    fine.run(most_hours=24)
    assert fine.jobs[0].completions == 1, "the control"
