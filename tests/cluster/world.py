"""A small world for the manager: a clock, a store, a provider and workers, all in memory, and a
source of faults that hits every call.

It is deterministic: a seed says what happens. Time passes only between two passes of the manager.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from openweights.cluster.org_manager import OrganizationManager
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Listing
from openweights.cluster.planning.observation import Pod, PodStatus
from openweights.cluster.pods.base import (
    NoCapacity,
    OutcomeUnknown,
    PodRefused,
    PodRequest,
    PodsUnavailable,
    RateLimited,
    SpendingLimit,
)
from openweights.errors import StoreUnavailableError
from openweights.types import JobRecord, Retry, WorkerRow
from tests.cluster.memory_store import Crash, Faults, FaultyStore, MemoryStore

START = datetime(2026, 11, 1, tzinfo=UTC)
LIMITS = Limits(
    max_workers=3,
    idle_s=60,
    startup_s=150,
    row_s=120,
    unresponsive_s=90,
    silent_limit_s=300,
    missing_pod_s=45,
    stopping_s=60,
)
POISON = "poison-"
# Parameters, hardware, memory and moments of rows that are poison.
_POISONS: tuple[tuple[Any, ...], ...] = (
    ({"cloud_type": 5}, {"cloud_type": None, "secrets": {"a": 1}}, {}, [], "x", None),
    (None, (), ("",), ("None",), ("0x",), ("99x NOPE",), ("1x A100", "\u202e"), ("1x " * 500,)),
    (0, -5, 2**31 - 1),
    (START, datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)),
)
LATEST_S = 90.0  # a new pod may be missing in the listing for this long


@dataclass
class Machine:
    """A pod that exists.

    Attributes:
        fate: What becomes of its worker: `works`, `never boots`, `dies at once`, `hangs`.
        stopped_until: Its processes stand still until then, as when a machine is suspended.
    """

    pod: Pod
    worker_id: str | None
    request: PodRequest | None
    created_at: datetime
    visible_at: datetime
    fate: str
    boot_s: float
    stopped_until: datetime = START


class MemoryPods:
    """The provider. `ours_at_most`: pods of ours that ran, and so kept a GPU, at the same time."""

    name = "memory"

    def __init__(self, now: Callable[[], datetime], faults: Faults) -> None:
        self._now = now
        self._faults = faults
        self.machines: dict[str, Machine] = {}
        self.terminated: list[str] = []
        self.ours_at_most = 0
        self._count = 0

    def start(self, request: PodRequest) -> Pod:
        if self._faults.happens(0.5):
            raise PodsUnavailable("by the test")
        for machine in self._visible():
            if machine.pod.name == request.name:
                return machine.pod
        for error in (NoCapacity("none"), SpendingLimit("no money"), RateLimited("slowly", 20)):
            if self._faults.happens():
                raise error
        if self._faults.happens(0.3):
            raise PodRefused("by the test")
        if self._faults.happens(0.5):
            raise OutcomeUnknown("was not started")
        pod = self.add(request.name, request)
        if self._faults.happens():
            raise OutcomeUnknown("was started")
        if self._faults.happens(0.3):
            raise Crash
        return pod

    def list_pods(self) -> list[Pod]:
        if self._faults.happens(0.5):
            raise PodsUnavailable("by the test")
        if self._faults.happens(0.3):
            raise RateLimited("slowly", 20)
        return [machine.pod for machine in self._visible()]

    def terminate(self, pod_id: str, name: str) -> None:
        def end() -> None:
            machine = self.machines.get(pod_id)
            if machine is None:
                return
            if machine.pod.name != name:
                raise PodRefused("another name")
            del self.machines[pod_id]
            self.terminated.append(machine.pod.name)

        self._faults.around(end, lambda: PodsUnavailable("by the test"))

    def logs(self, pod_id: str) -> str:
        return ""

    def stock(self) -> list[Listing]:
        if self._faults.happens(0.5):
            raise PodsUnavailable("by the test")
        return []

    # ---- the world's side

    def add(self, name: str, request: PodRequest | None = None) -> Pod:
        self._count += 1
        chance = self._faults.random
        pod = Pod(f"p{self._count}", name, "RUNNING", 1.0)
        late = chance.uniform(0, LATEST_S) if self._faults.happens(2) else 0.0
        fates = ["never boots", "dies at once", "hangs"]
        self.machines[pod.id] = Machine(
            pod,
            request.env["WORKER_ID"] if request else None,
            request,
            self._now(),
            self._now() + timedelta(seconds=late),
            chance.choice(fates) if self._faults.happens(2) else "works",
            chance.uniform(5, 60),
        )
        ours = [m for m in self.machines.values() if m.request is not None and m.pod.is_running]
        self.ours_at_most = max(self.ours_at_most, len(ours))
        return pod

    def set_status(self, pod_id: str, status: PodStatus) -> None:
        machine = self.machines[pod_id]
        machine.pod = replace(machine.pod, status=status)

    def _visible(self) -> list[Machine]:
        return [m for m in self.machines.values() if m.visible_at <= self._now()]


class World:
    """Everything together. `job_s`: how long the jobs take."""

    def __init__(self, seed: int, *, fault_share: float, limits: Limits = LIMITS) -> None:
        self.random = random.Random(seed)
        self.faults = Faults(self.random)
        self.fault_share = fault_share
        self.time = START
        self.store = MemoryStore(lambda: self.time)
        self.pods = MemoryPods(lambda: self.time, self.faults)
        self.foreign = {self.pods.add(name).id for name in ("jupyter", "ow-not-of-this-store")}
        self.limits = limits
        self.crashes = 0
        self.seen: Counter[str] = Counter()
        self.skew = timedelta(0)
        self._ids = 0
        self._left_s: dict[str, float] = {}
        self._failures_left = Counter[str]()
        self.restart()

    def restart(self) -> None:
        """A new manager, which knows nothing of the one before."""
        self.manager = OrganizationManager(
            FaultyStore(self.store, self.faults),  # type: ignore[arg-type]
            self.pods,
            limits=self.limits,
            worker_env={},
            clock=lambda: self.time + self.skew,
            new_id=self._new_id,
        )

    def submit(self, job_id: str, cloud_type: str, **options: Any) -> None:
        """A job that takes a minute or some."""
        self._left_s[job_id] = self.random.uniform(30, 300)
        self.store.jobs[job_id] = JobRecord(
            *(job_id, "custom", "true", {"cloud_type": cloud_type}),
            docker_image="img",
            **options,
            created_at=self.time,
            updated_at=self.time,
        )

    def submit_with_wishes(self, job_id: str, cloud_type: str) -> None:
        """A job that may have to wait for others, for a moment or for room, or fail at first."""
        chance, wishes = self.random, dict[str, Any]()
        others = sorted(job.id for job in self.jobs())
        if others and chance.random() < 0.4:
            self.seen["after"] += 1
            wishes["after"] = tuple(chance.sample(others, chance.randint(1, len(others))))
        if chance.random() < 0.3:
            self.seen["not before"] += 1
            wishes["not_before"] = self.time + timedelta(seconds=chance.uniform(0, 900))
        if chance.random() < 0.4:
            self.seen["label"] += 1
            wishes |= {"label": "gpu", "max_running": 1}
        if chance.random() < 0.4:
            wishes["retry"] = Retry(3, chance.uniform(0, 120), ("any",))
            self._failures_left[job_id] = chance.randint(0, 3)
        self.submit(job_id, cloud_type, **wishes)

    def poison(self) -> None:
        """A job that no client of ours would have written, as it is read."""
        self.seen["poison"] += 1
        job_id = f"{POISON}{self.seen['poison']}"
        params, hardware, vram_gb, moment = (self.random.choice(kind) for kind in _POISONS)
        self.store.jobs[job_id] = JobRecord(
            *(job_id, "custom", "true", params),
            docker_image="img",
            allowed_hardware=hardware,
            requires_vram_gb=vram_gb,
            timeout_at=moment,
            created_at=moment,
            updated_at=moment,
        )

    def cancel_poison(self) -> None:
        """Somebody has seen those rows: pods would be rented for them again and again."""
        for job in self.store.jobs.values():
            if job.id.startswith(POISON):
                self.store.jobs[job.id] = replace(job, status="canceled")

    def _disturb(self) -> None:
        """Clocks that jump, rows that are poison, and a queue that is paused for a while."""
        if self.faults.happens():
            self.seen["skew"] += 1
            self.skew = timedelta(seconds=self.random.choice((-86_400, -600, -15, 0, 15, 600, 3e6)))
        if self.faults.happens(0.5):
            self.poison()
        if self.faults.happens():
            self.store.is_paused = not self.store.is_paused
            self.seen["paused"] += self.store.is_paused

    def calm_down(self) -> None:
        """No faults from now on, and somebody has seen what was left of them."""
        self.fault_share, self.store.is_paused = 0.0, False
        self.cancel_poison()

    def step(self, seconds: float = 15.0) -> None:
        """A pass of the manager, with faults, and then some time."""
        self.faults.share = self.fault_share
        self._disturb()
        try:
            self.manager.step()
        except Crash:
            self.crashes += 1
            self.restart()
        except StoreUnavailableError:
            pass
        finally:
            self.faults.share = 0.0
        self.time += timedelta(seconds=seconds)
        for machine in list(self.pods.machines.values()):
            if machine.request is not None:
                self._live(machine, seconds)

    def _live(self, machine: Machine, seconds: float) -> None:
        """What a pod's worker does meanwhile."""
        self.faults.share = self.fault_share
        is_taken, vanishes = self.faults.happens(0.5), self.faults.happens(0.5)
        if self.faults.happens():
            self.seen["stopped"] += 1
            machine.stopped_until = self.time + timedelta(seconds=self.random.uniform(20, 400))
        self.faults.share = 0.0
        row = self.store.rows[machine.worker_id or ""]
        age_s = (self.time - machine.created_at).total_seconds()
        if machine.pod.status != "RUNNING" or machine.fate == "never boots":
            return
        if vanishes:
            del self.pods.machines[machine.pod.id]
        elif is_taken or machine.fate == "dies at once":
            self.pods.set_status(machine.pod.id, "EXITED")
        elif self.time < machine.stopped_until:
            return
        elif row.status == "starting" and age_s >= machine.boot_s:
            self.store.register(row.id, machine.pod.id)
        elif row.status in ("active", "shutdown") and machine.fate == "works":
            self._work(row, machine, seconds)

    def _work(self, row: WorkerRow, machine: Machine, seconds: float) -> None:
        self.store.ping(row.id)
        held = next((job for job in self.store.jobs.values() if job.worker_id == row.id), None)
        if row.status == "shutdown":
            self.store.set_worker_status(row.id, "terminated")
            self.pods.set_status(machine.pod.id, "EXITED")
        elif held is None:
            self.store.claim(row.id)
        else:
            self._left_s[held.id] -= seconds
            if self._left_s[held.id] > 0:
                return
            if self._failures_left[held.id] > 0:
                self._failures_left[held.id] -= 1
                self._left_s[held.id] = 30.0
                self.seen["retried"] += 1
                self.store.fail(held.id)
            else:
                self.store.finish(held.id)

    def _new_id(self) -> str:
        self._ids += 1
        return f"w{self._ids}"

    # ---- what must hold --------------------------------------------------------------------------

    def jobs(self) -> list[JobRecord]:
        """Those that are jobs."""
        return [job for job in self.store.jobs.values() if not job.id.startswith(POISON)]

    def ours(self) -> list[Machine]:
        return [machine for machine in self.pods.machines.values() if machine.request is not None]

    def is_at_rest(self) -> bool:
        """All jobs done, and nothing of ours exists any more."""
        done = all(job.status == "completed" for job in self.jobs())
        return done and not self.ours() and not self.store.worker_rows()
