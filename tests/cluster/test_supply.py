"""Pods that never come up cost a bounded sum; capacity that comes back is used within minutes; and
a manager whose clock is wrong ends nobody's pod.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Listing
from openweights.cluster.pods.base import NoCapacity
from tests.cluster.world import START, World
from tests.runpod_double.pods import GPUS


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _broken_image(jobs: int, restart_h: float | None, *, forgets: bool = False) -> float:
    """Pod-hours that are paid in two days for jobs whose image never comes up."""
    world = World(0, fault_share=0.0, limits=Limits())
    add = world.pods.add

    def never_boots(name: str, request: Any = None) -> Any:
        pod = add(name, request)
        world.pods.machines[pod.id].fate = "never boots"
        return pod

    world.pods.add = never_boots  # type: ignore[method-assign]
    for index in range(jobs):
        world.submit(f"job-{index}", "SECURE")
    paid_h, next_restart = 0.0, restart_h
    while (passed := world.time - START) < timedelta(hours=48):
        world.step(60)
        paid_h += len(world.ours()) / 60
        if next_restart is not None and passed >= timedelta(hours=next_restart):
            if forgets:
                world.store.state = {}
            world.restart()
            next_restart += restart_h or 0
    return paid_h


def test_a_broken_image_costs_a_bounded_sum() -> None:
    assert _broken_image(20, None) < 5


def test_a_manager_that_restarts_remembers_it() -> None:
    assert _broken_image(20, 6) < 6
    # The control: one that forgets pays for each restart.
    assert _broken_image(20, 6, forgets=True) > 12


@pytest.mark.parametrize("hours", [1, 6, 24])
@pytest.mark.parametrize("listing", ["honest", "boastful", "silent"])
def test_capacity_that_comes_back_is_used(hours: int, listing: str) -> None:
    world = World(0, fault_share=0.0, limits=Limits())
    start, back = world.pods.start, START + timedelta(hours=hours)

    def refuse_at_first(request: Any) -> Any:
        if world.time < back:
            raise NoCapacity("none")
        return start(request)

    def stock() -> list[Listing]:
        is_there = listing == "boastful" or world.time >= back
        level = "HIGH" if is_there else "NONE"
        return [] if listing == "silent" else [Listing(gpu, "SECURE", level) for gpu in GPUS]

    world.pods.start, world.pods.stock = refuse_at_first, stock  # type: ignore[method-assign]
    world.submit("job", "SECURE")
    while not world.ours():
        world.step(15)
        assert world.time - START < timedelta(hours=2 * hours + 48)
    waited = world.time - back
    # Where nothing is told of stock there are only tries, further and further apart.
    most_minutes = {"honest": 4, "boastful": 23, "silent": 60 * 2 * hours}[listing]
    assert waited < timedelta(minutes=most_minutes)


@pytest.mark.parametrize("skew_s", [-3600, 15, 3600])
def test_a_manager_whose_clock_is_wrong_ends_no_healthy_worker(skew_s: int) -> None:
    world = World(0, fault_share=0.0)

    def wrong() -> datetime:
        return world.time + timedelta(seconds=skew_s)

    world.manager._clock = wrong
    world.submit("job", "SECURE")
    for _ in range(200):
        world.step(15)
        if world.store.jobs["job"].status == "completed":
            break
    job = world.store.jobs["job"]
    assert (job.status, job.attempts) == ("completed", 1)
    assert len(world.pods.terminated) <= 1, "one pod was enough"


def test_the_clock_is_the_stores_indeed() -> None:
    """The control: taken at its word, the wrong clock ends the pod of a worker that is at work."""
    world = World(0, fault_share=0.0)
    world.manager._clock = lambda: world.time + timedelta(hours=1)
    world.manager._store_time = world.manager._clock  # type: ignore[method-assign]
    world.submit("job", "SECURE")
    for _ in range(40):
        world.step(15)
    assert len(world.pods.terminated) > 1
