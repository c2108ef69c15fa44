"""The manager in a world of faults: what must hold whatever goes wrong, and when."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import pytest

from openweights.cluster.org_manager import OrganizationManager
from openweights.cluster.planning.actions import ReportJobs, ReportPod, StartWorker
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Listing
from openweights.cluster.planning.observation import Pod, pod_name
from openweights.cluster.pods.base import NoCapacity, PodRefused, PodRequest
from openweights.cluster.watch import ReportLog
from openweights.errors import InvalidStateError, PlatformError, StoreUnavailableError
from openweights.types import JobRecord, WorkerSpec
from tests.cluster.memory_store import MemoryStore
from tests.cluster.world import LIMITS, World

SEQUENCES = 1000
BATCHES = 10
JOBS = (("a", "SECURE"), ("b", "COMMUNITY"), ("c", "ALL"), ("d", "SECURE"), ("e", "COMMUNITY"))
FAULTY_STEPS = 24
MOST_STEPS = 400


def live_through(seed: int, limits: Limits = LIMITS) -> World:
    """Faults for some minutes of work, rare or dense, then peace until the world is at rest."""
    world = World(seed, fault_share=(0.02, 0.05, 0.1, 0.2)[seed % 4], limits=limits)
    for number in range(FAULTY_STEPS):
        if number % 4 == 0 and number // 4 < len(JOBS):
            world.submit_with_wishes(*JOBS[number // 4])
        world.step()
        check_always(world)
    world.calm_down()
    for _ in range(MOST_STEPS):
        world.step(30.0)
        check_always(world)
        if world.is_at_rest():
            break
    return world


def check_always(world: World) -> None:
    assert world.pods.ours_at_most <= LIMITS.max_workers, "a pod too many"
    assert world.foreign <= world.pods.machines.keys(), "somebody else's pod was ended"
    for machine in world.ours():
        assert machine.worker_id in world.store.rows, "a pod without a row"
    assert len(world.store.running("gpu")) <= 1, "more of a label than may run"
    for job in world.jobs():
        has_begun = job.status in ("in_progress", "completed")
        assert not has_begun or world.store.are_completed(job.after), "a job ran before its turn"


def check_at_rest(world: World) -> None:
    unfinished = {job.id: job.status for job in world.jobs()}
    assert set(unfinished.values()) == {"completed"}, f"a job was lost: {unfinished}"
    assert set(world.store.completions.values()) == {1}, "a job was completed twice"
    assert world.ours() == [], "a pod is alive though its row has ended"
    rows = world.store.rows.values()
    assert {row.status for row in rows} == {"terminated"}
    assert all(row.ended_at is not None for row in rows if row.pod_id is not None)
    world.step()  # revoking may have waited for this
    assert all(key.revoked_at is not None for key in world.store.keys.values())


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_faults(batch: int) -> None:
    for seed in range(batch, SEQUENCES, BATCHES):
        try:
            check_at_rest(live_through(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: live_through({seed}) shows it again") from error


def test_without_faults() -> None:
    world = World(1, fault_share=0.0)
    for job in JOBS:
        world.submit(*job)
    while not world.is_at_rest():
        world.step()
        check_always(world)
    check_at_rest(world)
    assert len(world.store.rows) <= len(JOBS)


def test_the_faults_are_there() -> None:
    """In some of those sequences managers crashed, and pods were started again."""
    worlds = [live_through(seed) for seed in range(60)]
    assert sum(world.crashes for world in worlds) > 10
    seen = sum((world.seen for world in worlds), Counter[str]())
    assert min(seen[kind] for kind in ("skew", "poison", "stopped", "paused")) > 20
    assert min(seen[kind] for kind in ("after", "not before", "label", "retried")) > 20
    assert sum(len(world.store.rows) for world in worlds) > 2 * 60 * len(JOBS) / 3
    names = {name for world in worlds for name in world.pods.terminated}
    assert names and all(name.startswith("ow-w") for name in names)


def test_a_pod_too_many_is_noticed() -> None:
    """The control."""
    with pytest.raises(AssertionError, match="a pod too many"):
        for seed in range(20):
            live_through(seed, replace(LIMITS, max_workers=LIMITS.max_workers + 1))


def test_two_pods_for_four_groups() -> None:
    """The older runner counted free slots once per group, and started eight."""
    world = World(0, fault_share=0.0, limits=replace(LIMITS, max_workers=2))
    for number, gpu in enumerate(("A100", "A100S", "H100S", "H200")):
        world.submit(f"job-{number}", "SECURE", allowed_hardware=(f"1x {gpu}",))
    world.step(0)
    world.step(0)
    assert len(world.ours()) == 2
    assert {m.pod.name for m in world.ours()} == {pod_name(id) for id in world.store.rows}


class Racing(MemoryStore):
    """A worker takes its job just after the manager has read what is pending."""

    def list_jobs(self, *, statuses: Sequence[str], limit: int | None) -> list[JobRecord]:
        for row in self.rows.values():
            if row.status == "active" and not any(
                j.worker_id == row.id for j in self.jobs.values()
            ):
                self.claim(row.id)
        return super().list_jobs(statuses=statuses, limit=limit)


def test_a_job_that_is_taken_meanwhile_gets_no_second_pod() -> None:
    world = World(0, fault_share=0.0)
    world.store = Racing(lambda: world.time)
    world.restart()
    world.submit("a", "SECURE")
    world.step(60)
    world.step()
    world.step()
    assert world.store.jobs["a"].status == "in_progress"
    assert len(world.store.rows) == 1


@pytest.mark.parametrize("has_run", [False, True])
def test_a_worker_that_gives_up_at_once_is_not_rented_again_and_again(has_run: bool) -> None:
    world = World(0, fault_share=0.0)
    world.submit("a", "SECURE")
    for _ in range(40):
        world.step(30)
        for machine in world.ours():
            worker_id = machine.worker_id or ""
            if world.store.rows[worker_id].status == "active":
                # Between two passes: the manager has not seen whether it had the job.
                if has_run:
                    world.store.claim(worker_id)
                world.store.set_worker_status(worker_id, "terminated")
    # In 20 minutes. One that had the job was taken away, which says nothing against its kind.
    assert (len(world.store.rows) > 12) == has_run


def test_dry_run_changes_nothing() -> None:
    world = World(0, fault_share=0.0)
    world.submit("a", "SECURE")
    (action,) = (
        a for a in world.manager.plan(world.manager.observe()) if isinstance(a, StartWorker)
    )
    assert action.job_id == "a"
    assert world.store.rows == {} and world.ours() == [] and world.store.keys == {}


def test_an_error_of_any_kind_does_not_end_the_loop() -> None:
    world = World(0, fault_share=0.0)
    stop = threading.Event()
    passes: list[str] = []

    def clock() -> datetime:
        passes.append("pass")
        if len(passes) > 3:
            stop.set()
        raise (ValueError("a bug"), StoreUnavailableError("away"))[len(passes) % 2]

    manager = OrganizationManager(
        world.store,  # type: ignore[arg-type]
        world.pods,
        limits=LIMITS,
        worker_env={},
        clock=clock,
    )
    manager.run(stop, poll_s=0.001)
    assert len(passes) > 3


@pytest.mark.parametrize("provider", ["memory", "local"], ids=["rival", "control"])
def test_of_two_managers_neither_starts_a_second_pod(provider: str) -> None:
    """The other one, on another machine, writes its row after this one has looked."""
    world = World(0, fault_share=0.0)
    world.submit("a", "SECURE")
    seen = world.manager.observe()
    rival = WorkerSpec("of-another-manager", hardware_type="1x A40")
    world.store.create_worker(rival, provider=provider, price_usd_per_hour=1.0)
    (start,) = (a for a in world.manager.plan(seen) if isinstance(a, StartWorker))
    if provider == "local":  # that one's limit and pods are not ours
        world.manager._start(start, seen)
        assert len(world.ours()) == 1
        return
    with pytest.raises(PlatformError, match="another manager has just started of-another"):
        world.manager._start(start, seen)
    assert world.ours() == []
    assert {r.status for r in world.store.rows.values() if r.id != rival.id} == {"terminated"}


def test_the_workers_of_another_provider_are_left_alone() -> None:
    world = World(0, fault_share=0.0)
    world.store.create_worker(WorkerSpec("w-local"), provider="local", price_usd_per_hour=0.0)
    world.store.set_worker_pod("w-local", "its-pod", 0.0)
    world.store.register("w-local", "its-pod")
    for _ in range(20):
        world.step(60)
    assert world.store.rows["w-local"].status == "active"
    world.store.set_worker_status("w-local", "terminated")
    world.step()
    assert world.store.rows["w-local"].ended_at is None, "whether its pod is gone is not known here"


def test_a_starting_worker_that_nobody_looks_after_does_not_keep_a_job_waiting() -> None:
    world = World(0, fault_share=0.0)
    left = WorkerSpec("w-local", vram_gb=80, hardware_type="1x A100", cloud_type="SECURE")
    world.store.create_worker(left, provider="local", price_usd_per_hour=0.0)
    world.submit("a", "SECURE")
    for _ in range(20):
        world.step(30)
    assert world.store.jobs["a"].status == "completed"


class OneBadRow(MemoryStore):
    """One worker's costs, and one worker's key, cannot be closed."""

    def end_worker_pod(self, worker_id: str) -> None:
        if worker_id == min(self.rows):
            raise InvalidStateError("by the test")
        super().end_worker_pod(worker_id)

    def revoke_key(self, key_id: str) -> None:
        if key_id == "key-0":
            raise InvalidStateError("by the test")
        super().revoke_key(key_id)


def test_one_bad_row_does_not_keep_the_others_open() -> None:
    world = World(0, fault_share=0.0)
    world.store = OneBadRow(lambda: world.time)
    world.restart()
    for job in JOBS[:3]:
        world.submit(*job)
    for _ in range(30):
        world.step(30)
    rows = world.store.rows
    assert len(rows) == 3
    assert [id for id, row in rows.items() if row.ended_at is None] == [min(rows)]
    assert [id for id, key in world.store.keys.items() if key.revoked_at is None] == ["key-0"]


def test_pods_are_looked_after_without_a_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, fault_share=0.0)

    def stock() -> list[Listing]:
        raise PodRefused("HTTP 404")

    monkeypatch.setattr(world.pods, "stock", stock)
    world.submit("a", "SECURE")
    while not world.is_at_rest():
        world.step()
    check_at_rest(world)


def test_what_is_old_is_removed_once_a_day_where_the_organization_says_so() -> None:
    world = World(0, fault_share=0.0)
    for days in (None, 30.0):
        world.store.keep_days = days
        for _ in range(49):
            world.step(3600)
    assert [(at - world.store.collected[0]).days for at in world.store.collected] == [0, 1]


def test_the_key_of_a_worker_that_did_not_come_is_revoked() -> None:
    world = World(0, fault_share=0.0)

    def start(request: PodRequest) -> Pod:
        raise NoCapacity("none")

    world.pods.start = start  # type: ignore[method-assign]
    world.submit("a", "SECURE")
    world.step()
    world.step()
    assert world.store.keys
    assert all(key.revoked_at is not None for key in world.store.keys.values())


def test_what_jobs_wait_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    notices = ReportLog()
    for ids in (("a", "b"), ("b", "a"), ("a", "b", "c"), ("c",), ("c",), ("a",)):
        notices.write([ReportJobs(ids, "no pod", can_wait=True), ReportPod("p", "somebody's")])
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "2 jobs wait (a, b)",
        "pod p (somebody's) is not ours",
        "3 jobs wait (a, b, c)",
        "1 job waits (a)",
    ]


def test_failing_for_days_does_not_end_the_loop() -> None:
    """2.0 ** 1024 is an OverflowError."""
    world = World(0, fault_share=0.0)
    stop = Hurried(passes=1100)
    world.manager._clock = lambda: 1 / 0  # type: ignore[assignment]
    logging.disable(logging.CRITICAL)
    try:
        world.manager.run(stop, poll_s=15.0)
    finally:
        logging.disable(logging.NOTSET)
    assert stop.passes == 0 and stop.longest_s == 300


class Hurried(threading.Event):
    """Does not wait; set after so many passes."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes
        self.longest_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.longest_s = max(self.longest_s, timeout or 0.0)
        self.passes -= 1
        if self.passes == 0:
            self.set()
        return self.is_set()


def test_the_last_lines_of_a_pod_that_dies_stay_in_the_runs_log() -> None:
    world = World(0, fault_share=0.0)
    world.pods.logs = lambda pod_id: "step 7\nCUDA error: unknown, key ow_0123456789abcdef"
    world.submit("a", "SECURE")
    while world.store.jobs["a"].status != "in_progress":
        world.step()
    (machine,) = world.ours()
    world.pods.set_status(machine.pod.id, "EXITED")
    assert world.store.kept_logs == {}
    while world.store.jobs["a"].status == "in_progress":
        world.step()
    (text,) = [kept.decode() for kept in world.store.kept_logs.values()]
    assert text.startswith("[openweights] its pod ended, and had printed last:\nstep 7\nCUDA error")
    assert "ow_0123" not in text
