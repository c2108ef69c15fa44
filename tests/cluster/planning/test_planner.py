"""The planner's promises, as statements about random clusters, each with an oracle of its own."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import assume, given, settings

from openweights.cluster.planning.actions import (
    AdoptPod,
    EndWorker,
    ReportJobs,
    ReportPod,
    StartWorker,
    StopWorker,
    TerminatePod,
)
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import Demand, Pod, Worker
from openweights.images import UNSLOTH_IMAGE
from tests.cluster.random_clusters import (
    IMAGES,
    LIMITS,
    NOW,
    World,
    ago,
    busy,
    can_be_rented,
    can_take,
    demand,
    fits,
    most_jobs,
    pod_of,
    worker,
    worlds,
)


def of(kind: type, actions: tuple[Any, ...]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def ended(actions: tuple[Any, ...]) -> set[str]:
    return {action.worker_id for action in of(EndWorker, actions)}


def free_workers(world: World, actions: tuple[Any, ...]) -> list[Worker]:
    """Idle or starting, and not lost. Whether one is lost the tests of liveness say; one that
    another starts, and that is silent, the planner ends no more than it counts on it.
    """
    gone = ended(actions)
    return [
        w
        for w in world.workers
        if w.id not in gone
        and w.job is None
        and w.status in ("starting", "active")
        and (w.pinged_at >= ago(120) or (w.status == "starting" and w.is_managed))
    ]


def running_pods(world: World) -> dict[str, Worker | None]:
    """Pods that run, and the row that names them."""
    by_name = {f"ow-{w.id}": w for w in world.workers if w.is_managed}
    return {pod.id: by_name.get(pod.name) for pod in world.pods or () if pod.status != "EXITED"}


# ---- how many ------------------------------------------------------------------------------------


def in_use(world: World) -> int:
    """What runs and is paid for: a pod for each row, even one that is still to come, and pods of
    ours besides.
    """
    rows = {w.id for w in world.workers if w.is_managed and w.status != "terminated"}
    pods = Counter(w.id for w in running_pods(world).values() if w is not None)
    return sum(max(1, pods[id]) for id in rows) + sum(pods[id] for id in pods.keys() - rows)


@given(worlds())
def test_limit_holds_over_all_groups_together(world: World) -> None:
    starts = len(of(StartWorker, world.plan()))
    assert starts == 0 or in_use(world) + starts <= world.limits.max_workers


def test_two_slots_and_four_hardware_groups_give_two_pods() -> None:
    names = ("1x A100", "1x H100S", "1x H200", "2x A100")
    jobs = [demand(n, allowed_hardware=(names[n % 4],)) for n in range(40)]
    actions = World(tuple(jobs), (), (), Limits(max_workers=2)).plan()
    starts = of(StartWorker, actions)
    assert len(starts) == 2 == len(actions)
    assert len({start.offers[0].hardware_type for start in starts}) == 2


@given(worlds())
def test_no_pod_for_what_a_free_worker_can_take(world: World) -> None:
    actions = world.plan()
    started = {start.job_id for start in of(StartWorker, actions)}
    free = free_workers(world, actions)
    others = [job for job in world.jobs if job.id not in started]
    assert most_jobs(free, world.jobs) == most_jobs(free, others)
    assert len(of(StartWorker, actions)) == len(started)


@given(worlds())
def test_every_job_is_taken_started_reported_or_waits_for_a_slot(world: World) -> None:
    actions = world.plan()
    free = free_workers(world, actions)
    staying = [w for w in world.workers if w.id not in ended(actions)]
    staying = [w for w in staying if w.status in ("starting", "active")]
    hopeless = [j for j in world.jobs if not can_be_rented(j, world.market, world.limits)]
    reported = {id for report in of(ReportJobs, actions) for id in report.job_ids}
    alone = {j.id for j in hopeless if not any(can_take(w, j) for w in staying)}
    assert alone == reported
    assert all(report.reason and not report.can_wait for report in of(ReportJobs, actions))
    starts = len(of(StartWorker, actions))
    rentable = [job for job in world.jobs if job not in hopeless]
    unmet = len(world.jobs) - most_jobs(free, world.jobs)
    if starts < unmet - len(hopeless):
        # Pods that have ended may hold a slot until they are gone.
        exited = sum(pod.status == "EXITED" for pod in world.pods or ())
        assert in_use(world) + exited + starts >= world.limits.max_workers
    assert starts <= len(rentable)


def test_starting_and_idle_workers_count_and_busy_ones_do_not() -> None:
    jobs = tuple(demand(n) for n in range(4))
    idle = worker(0)
    starting = worker(1, status="starting", created_at=ago(60), pinged_at=ago(60), idle_since=None)
    occupied = busy(2, demand(9))
    pods = tuple(pod_of(w) for w in (idle, starting, occupied))
    actions = World(jobs, (idle, starting, occupied), pods, Limits(max_workers=20)).plan()
    assert [start.job_id for start in of(StartWorker, actions)] == ["job-2", "job-3"]


def test_a_worker_that_must_be_shared_is_given_to_whom_it_alone_can_serve() -> None:
    # The older job could go to either; by itself it would be given the cheaper one, which is large.
    small = worker(0)
    large = worker(1, hardware_type="1x H200", vram_gb=141, usd_per_hour=0.5)
    jobs = (demand(0), demand(1, requires_vram_gb=100))
    pods = (pod_of(small), pod_of(large))
    assert World(jobs, (small, large), pods).plan() == ()
    assert len(of(StartWorker, World(jobs, (large,), pods[1:]).plan())) == 1, "the control"


# ---- what is asked for ---------------------------------------------------------------------------


@given(worlds())
def test_offers_fit_their_job_cheapest_first(world: World) -> None:
    jobs = {job.id: job for job in world.jobs}
    for start in of(StartWorker, world.plan()):
        job = jobs[start.job_id]
        assert start.image == (job.docker_image or UNSLOTH_IMAGE)
        assert start.offers
        assert all(fits(offer, job, world.market, world.limits) for offer in start.offers)
        prices = [offer.usd_per_hour for offer in start.offers]
        assert prices == sorted(prices)
        if job.cloud_type != "ALL":
            assert {offer.cloud for offer in start.offers} == {job.cloud_type}


def test_all_is_both_clouds_the_cheaper_one_first() -> None:
    actions = World((demand(cloud_type="ALL", allowed_hardware=("1x A100",)),), (), ()).plan()
    (start,) = of(StartWorker, actions)
    assert [(o.cloud, o.usd_per_hour) for o in start.offers] == [
        ("COMMUNITY", 1.19),
        ("SECURE", 1.79),
    ]


def test_a_secure_job_leaves_a_community_worker_alone() -> None:
    idle = worker(cloud_type="COMMUNITY")
    actions = World((demand(),), (idle,), (pod_of(idle),)).plan()
    assert {offer.cloud for offer in of(StartWorker, actions)[0].offers} == {"SECURE"}
    for cloud_type in ("COMMUNITY", "ALL"):
        assert World((demand(cloud_type=cloud_type),), (idle,), (pod_of(idle),)).plan() == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requires_vram_gb": 5000}, "5000 GiB"),
        ({"allowed_hardware": ("1x TPU",)}, "'1x TPU' is not known"),
        ({"allowed_hardware": ("1x A40",), "cloud_type": "COMMUNITY"}, "not on offer on COMMUNITY"),
        ({"allowed_hardware": ("1x A40",), "requires_vram_gb": 60}, "has 43 GiB for sure"),
        ({"usd_left": 0.01}, "raise max_cost_usd"),
    ],
)
def test_a_job_that_nothing_fits_is_told_why(changes: dict[str, Any], said: str) -> None:
    (report,) = World((demand(**changes),), (), ()).plan()
    assert isinstance(report, ReportJobs)
    assert said in report.reason
    assert not report.can_wait


def test_a_price_cap_is_kept_by_pods_and_by_workers() -> None:
    jobs = (demand(max_usd_per_hour=0.5),)
    (start,) = of(StartWorker, World(jobs, (), ()).plan())
    assert start.offers and all(offer.usd_per_hour <= 0.5 for offer in start.offers)
    dear, cheap = worker(0, usd_per_hour=2.0), worker(1, usd_per_hour=0.4)
    pods = (pod_of(dear), pod_of(cheap))
    assert of(StartWorker, World(jobs, (dear,), pods[:1]).plan()), "the dear one does not take it"
    assert not of(StartWorker, World(jobs, (dear, cheap), pods).plan())
    (report,) = World((demand(max_usd_per_hour=0.01),), (), ()).plan()
    assert isinstance(report, ReportJobs) and report.can_wait
    assert "max_usd_per_hour is 0.01; raise it" in report.reason


def test_what_only_somebodys_own_machine_can_take_waits_for_it() -> None:
    job = demand(requires_vram_gb=5000)
    mine = busy(0, demand(9), is_managed=False, pod_id=None, cloud_type=None, vram_gb=6000)
    assert World((job,), (mine,), ()).plan() == ()
    assert World((job,), (replace(mine, status="shutdown"),), ()).plan() != (), "the control"


def test_several_gpus_when_one_is_too_small() -> None:
    (start,) = World((demand(requires_vram_gb=200),), (), ()).plan()
    assert isinstance(start, StartWorker)
    assert {offer.gpu_count for offer in start.offers} == {2}
    assert start.offers[0].hardware_type == "2x H200"


# ---- when nothing may be started -----------------------------------------------------------------


@given(worlds())
def test_an_unknown_account_is_left_as_it_is(world: World) -> None:
    actions = replace(world, pods=None).plan()
    assert not of(StartWorker, actions)
    assert not of(TerminatePod, actions)
    assert not of(AdoptPod, actions)
    # A pod that nobody could look up is no reason to give up a worker that is heard of.
    for end in of(EndWorker, actions):
        w = next(w for w in world.workers if w.id == end.worker_id)
        is_late = NOW - w.created_at > timedelta(seconds=LIMITS.startup_s)
        has_hung = w.stopping_since is not None and w.stopping_since < ago(LIMITS.stopping_s)
        assert w.pinged_at < ago(LIMITS.unresponsive_s) or is_late or has_hung


def test_the_spending_limit_pauses_starts_only() -> None:
    idle = worker(idle_since=ago(400))
    other = demand(docker_image=IMAGES[1])
    market = Market().spending_limit(NOW)
    actions = World((other,), (idle,), (pod_of(idle),), market=market).plan()
    assert not of(StartWorker, actions)
    assert [stop.worker_id for stop in of(StopWorker, actions)] == ["w0"]
    assert of(ReportJobs, actions)[0].can_wait
    later = replace(market, paused_until=NOW)
    assert of(StartWorker, World((other,), (), (), market=later).plan())


def test_capacity_that_rests_is_waited_for_and_said() -> None:
    job = demand(allowed_hardware=("1x H200",))
    (start,) = World((job,), (), ()).plan()
    market = Market()
    for _ in range(3):
        market = market.refused(start.offers[0], NOW)
    (report,) = World((job,), (), (), market=market).plan()
    assert report.can_wait
    assert "1x H200 on SECURE" in report.reason
    assert "12:01" in report.reason


# ---- shares --------------------------------------------------------------------------------------


@given(worlds(max_jobs=14))
@settings(max_examples=200)
def test_slots_are_shared_between_owners_and_between_groups(world: World) -> None:
    world = replace(world, jobs=tuple(replace(job, priority=0) for job in world.jobs), workers=())
    world = replace(world, pods=())
    started = {start.job_id for start in of(StartWorker, world.plan())}
    given_to = Counter(job.owner for job in world.jobs if job.id in started)
    rentable = [j for j in world.jobs if can_be_rented(j, world.market, world.limits)]
    left = [job for job in rentable if job.id not in started]
    assert not left or len(started) == world.limits.max_workers
    for job in left:
        assert max(given_to.values(), default=0) <= given_to[job.owner] + 1
    by_group = Counter(group(job) for job in world.jobs if job.id in started)
    for job in left:
        mine = [count for key, count in by_group.items() if key[0] == job.owner]
        assert max(mine, default=0) <= by_group[group(job)] + 1


def group(job: Demand) -> tuple[object, ...]:
    hardware = job.allowed_hardware
    size = tuple(sorted(hardware)) if hardware else job.requires_vram_gb
    return (job.owner, job.docker_image, job.cloud_type, size)


def test_priority_comes_before_shares() -> None:
    jobs = [demand(n, owner="ann", priority=1) for n in range(3)]
    jobs += [demand(9, owner="bob", waiting_since=ago(9999))]
    actions = World(tuple(jobs), (), (), Limits(max_workers=3)).plan()
    assert {start.job_id for start in of(StartWorker, actions)} == {"job-0", "job-1", "job-2"}


def test_who_holds_workers_already_waits() -> None:
    held = [busy(n, demand(50 + n, owner="ann")) for n in range(2)]
    jobs = (demand(0, owner="ann"), demand(1, owner="bob"), demand(2, owner="bob"))
    pods = tuple(pod_of(w) for w in held)
    actions = World(jobs, tuple(held), pods, Limits(max_workers=4)).plan()
    assert {start.job_id for start in of(StartWorker, actions)} == {"job-1", "job-2"}


# ---- scaling down --------------------------------------------------------------------------------


@given(worlds())
def test_only_idle_or_rotated_workers_of_ours_are_stopped(world: World) -> None:
    by_id = {w.id: w for w in world.workers}
    actions = world.plan()
    stopped = of(StopWorker, actions)
    assert len({stop.worker_id for stop in stopped}) == len(stopped)
    for stop in stopped:
        w = by_id[stop.worker_id]
        assert w.is_managed
        assert w.status == "active"
        if w.job is not None:
            assert w.created_at <= ago(world.limits.rotate_s)
            older = [job for job in world.jobs if job.waiting_since < (w.run_started_at or NOW)]
            assert any(job.priority >= w.job.priority and not can_take(w, job) for job in older)


@given(worlds())
def test_nobody_is_idle_for_long(world: World) -> None:
    actions = world.plan()
    stopped = {stop.worker_id for stop in of(StopWorker, actions)} | ended(actions)
    jobs = [job for job in world.jobs if job.waiting_since <= NOW]
    for w in world.workers:
        if w.status != "active" or w.job is not None or not w.is_managed or w.idle_since is None:
            continue
        has_work = any(can_take(w, job) for job in jobs)
        patience = LIMITS.idle_s * (2 if has_work else 1)
        assert w.idle_since > ago(patience) or w.id in stopped


def test_an_idle_worker_that_ignores_its_job_is_faulty() -> None:
    lazy = worker(idle_since=ago(400))
    job = demand(waiting_since=ago(100))
    (stop,) = of(StopWorker, World((job,), (lazy,), (pod_of(lazy),)).plan())
    assert stop.is_faulty
    new = demand(waiting_since=ago(10))
    assert World((new,), (lazy,), (pod_of(lazy),)).plan() == (), "it may be about to take it"
    lazier = replace(lazy, idle_since=ago(700))
    (stop,) = of(StopWorker, World((new,), (lazier,), (pod_of(lazier),)).plan())
    assert stop.is_faulty, "but it has had many such"


def test_a_worker_with_less_memory_than_was_rented_ends_before_another_is_started() -> None:
    broken = worker(vram_gb=3, has_worked=False, idle_since=ago(10))
    world = World((demand(requires_vram_gb=24, allowed_hardware=("1x A100",)),), (broken,), ())
    (stop,) = world.plan()
    assert stop.is_faulty
    assert "3 GiB" in stop.reason
    proven = replace(broken, has_worked=True)
    assert of(StartWorker, replace(world, workers=(proven,)).plan()), "the control"


def test_a_worker_that_never_had_a_job_was_rented_in_vain() -> None:
    for has_worked in (True, False):
        idle = worker(has_worked=has_worked, idle_since=ago(400))
        (stop,) = World((), (idle,), (pod_of(idle),)).plan()
        assert stop.is_faulty is not has_worked


def test_of_two_idle_workers_and_one_job_the_longer_idle_one_ends() -> None:
    idle = (worker(0, idle_since=ago(400)), worker(1, idle_since=ago(100)))
    world = World((demand(waiting_since=ago(1)),), idle, tuple(pod_of(w) for w in idle))
    (stop,) = world.plan()
    assert stop == StopWorker("w0", "idle for 400 s")


def test_idle_workers_make_room_for_others() -> None:
    idle = [worker(n, idle_since=ago(100 - n)) for n in range(3)]
    other = demand(docker_image=IMAGES[1])
    pods = tuple(pod_of(w) for w in idle)
    world = World((other,), tuple(idle), pods, Limits(max_workers=3))
    assert [stop.worker_id for stop in of(StopWorker, world.plan())] == ["w0"]
    leaving = replace(idle[1], status="shutdown", stopping_since=ago(5))
    world = replace(world, workers=(idle[0], leaving, idle[2]))
    assert world.plan() == (), "a slot is about to be free"


def test_a_group_without_workers_gets_the_slot_of_a_job_that_came_later() -> None:
    other = demand(0, docker_image=IMAGES[1], waiting_since=ago(1000))
    late = busy(0, demand(50), run_started_at=ago(20))
    early = busy(1, demand(51), run_started_at=ago(2000), created_at=ago(4000))
    pods = (pod_of(late), pod_of(early))
    world = World((other,), (late, early), pods, Limits(max_workers=2))
    assert [stop.worker_id for stop in of(StopWorker, world.plan())] == ["w0"]
    leaving = replace(early, status="shutdown", stopping_since=ago(5))
    assert replace(world, workers=(late, leaving)).plan() == (), "a slot is about to be free"
    fresh = replace(late, created_at=ago(600))
    assert replace(world, workers=(fresh, early)).plan() == (), "it has only just come"
    assert replace(world, limits=Limits(max_workers=3)).plan() != world.plan(), "a slot is free"
    busy_jobs = (replace(late, job=demand(50, priority=2)), early)
    assert replace(world, workers=busy_jobs).plan() == (), "what runs is more important"


# ---- rows and pods -------------------------------------------------------------------------------


@given(worlds())
def test_pods_that_no_row_names_are_reported_and_never_touched(world: World) -> None:
    actions = world.plan()
    assert {report.pod_id for report in of(ReportPod, actions)} == {"pod-x", "pod-y"}
    touched = {a.pod_id for a in (*of(TerminatePod, actions), *of(AdoptPod, actions))}
    assert not touched & {"pod-x", "pod-y"}


@given(worlds())
def test_pods_of_ended_rows_are_terminated_and_no_others(world: World) -> None:
    actions = world.plan()
    rows = {w.id: w for w in world.workers}
    gone = ended(actions) | {w.id for w in world.workers if w.status == "terminated"}
    terminated = {action.pod_id: action.worker_id for action in of(TerminatePod, actions)}
    surplus = {action.pod_id for action in of(TerminatePod, actions) if action.is_surplus}
    adopted = {action.worker_id: action.pod_id for action in of(AdoptPod, actions)}
    for pod in world.pods or ():
        owner = rows.get(pod.name.removeprefix("ow-"))
        if owner is None:
            continue
        if owner.id in gone:
            assert terminated[pod.id] == owner.id
            assert pod.id not in surplus
        elif pod.id in terminated:
            # The second of two: the first is in the row, or is going to be.
            assert pod.id in surplus
            kept = adopted.get(owner.id, owner.pod_id)
            assert kept != pod.id
            assert kept in {other.id for other in world.pods or ()}


@given(worlds())
def test_signs_of_life_decide(world: World) -> None:
    actions = world.plan()
    gone = ended(actions)
    pods = {pod.id for pod in world.pods or () if pod.status != "EXITED"}
    for w in world.workers:
        if not w.is_managed or w.status == "terminated":
            assert w.id not in gone
        elif w.status == "starting":
            is_late = w.created_at < ago(LIMITS.startup_s)
            assert not is_late or w.id in gone
        else:
            has_hung = w.stopping_since is not None and w.stopping_since < ago(LIMITS.stopping_s)
            was_heard = w.pinged_at >= ago(LIMITS.missing_pod_s)
            has_written = w.log_grew_at is not None and w.log_grew_at >= ago(LIMITS.unresponsive_s)
            has_pod = w.pod_id is None or {w.pod_id, f"late-{w.id}"} & pods
            if was_heard and not has_hung:
                assert w.id not in gone
            if has_written and has_pod and not has_hung and w.pinged_at >= ago(1800):
                assert w.id not in gone
            if w.pinged_at < ago(LIMITS.silent_limit_s):
                assert w.id in gone
            if w.pinged_at < ago(LIMITS.unresponsive_s) and not has_written:
                assert w.id in gone


def test_a_silent_worker_whose_log_grows_is_alive_within_a_limit() -> None:
    silent = busy(0, demand(), pinged_at=ago(900), log_grew_at=ago(20))
    world = World((), (silent,), (pod_of(silent),))
    assert world.plan() == ()
    for lost in (
        replace(silent, log_grew_at=ago(500)),
        replace(silent, log_grew_at=None),
        replace(silent, pinged_at=ago(2000), created_at=ago(9000)),
    ):
        end, terminate = replace(world, workers=(lost,)).plan()
        assert isinstance(end, EndWorker)
        assert not end.is_boot_failure
        assert terminate == TerminatePod("pod-0", "w0", end.reason)


def test_a_lost_worker_is_replaced_once_its_slot_is_free() -> None:
    lost = busy(0, demand(50), pinged_at=ago(500))
    job = demand()
    limits = Limits(max_workers=1)
    actions = World((job,), (lost,), (pod_of(lost),), limits).plan()
    assert {type(action) for action in actions} == {EndWorker, TerminatePod}
    over = replace(lost, status="terminated", job=None)
    actions = World((job,), (over,), (pod_of(over),), limits).plan()
    assert [type(action) for action in actions] == [TerminatePod], "its pod still runs"
    assert of(StartWorker, World((job,), (), (), limits).plan())


def test_a_row_without_a_pod_waits_is_adopted_or_ends() -> None:
    row = worker(
        status="starting", pod_id=None, created_at=ago(60), pinged_at=ago(60), idle_since=None
    )
    assert World((demand(),), (row,), ()).plan() == ()
    found = Pod("pod-9", "ow-w0", "STARTING", 1.5)
    assert World((demand(),), (row,), (found,)).plan() == (AdoptPod("w0", "pod-9", 1.5),)
    late = replace(row, created_at=ago(200))
    (end,) = World((), (late,), ()).plan()
    assert isinstance(end, EndWorker)
    assert not end.is_boot_failure, "no hardware has failed: nothing came"


def test_of_two_pods_of_one_name_one_is_kept() -> None:
    row = busy(0, demand())
    second = Pod("pod-00", "ow-w0", "RUNNING")
    actions = World((), (row,), (pod_of(row), second)).plan()
    assert [(a.pod_id, a.worker_id) for a in of(TerminatePod, actions)] == [("pod-00", "w0")]
    assert len(actions) == 1


def test_a_pod_that_two_rows_name_stays_while_one_of_them_lives() -> None:
    alive = busy(0, demand())
    over = worker(1, status="terminated", pod_id="pod-0", idle_since=None)
    assert World((), (alive, over), (pod_of(alive),)).plan() == ()
    nameless = replace(alive, pod_id=None)
    assert World((), (nameless, over), (pod_of(alive),)).plan() == (AdoptPod("w0", "pod-0", 1.79),)


def test_the_pod_in_which_somebody_runs_a_worker_is_theirs() -> None:
    theirs = worker(is_managed=False, status="terminated", idle_since=None)
    assert World((), (theirs,), (Pod("pod-0", "my box", "RUNNING"),)).plan() == ()


def test_a_worker_that_ended_without_having_worked_counts_as_a_failed_boot() -> None:
    over = worker(status="terminated", has_worked=False, idle_since=None)
    (terminate,) = World((), (over,), (pod_of(over),)).plan()
    assert terminate.is_boot_failure
    asked = replace(over, stopping_since=ago(60))
    (terminate,) = World((), (asked,), (pod_of(asked),)).plan()
    assert not terminate.is_boot_failure


# ---- the whole -----------------------------------------------------------------------------------


@given(worlds())
def test_plans_do_not_depend_on_the_order_of_what_was_seen(world: World) -> None:
    shuffled = random.Random(0)
    jobs, workers, pods = (list(part) for part in (world.jobs, world.workers, world.pods or ()))
    for part in (jobs, workers, pods):
        shuffled.shuffle(part)
    other = replace(world, jobs=tuple(jobs), workers=tuple(workers), pods=tuple(pods))
    assert set(other.plan()) == set(world.plan())


@given(worlds())
def test_machines_of_others_are_never_acted_upon(world: World) -> None:
    assume(any(not w.is_managed for w in world.workers))
    theirs = {w.id for w in world.workers if not w.is_managed}
    for action in world.plan():
        assert getattr(action, "worker_id", None) not in theirs
