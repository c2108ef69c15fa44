"""A day of a cluster in a few seconds: jobs, pods that fail in every way, and a manager that only
does what the planner says.

Time goes in steps. The provider, the workers and the store's claims are written here from their
descriptions; of the package only the planner and the market are used.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from openweights.cluster.planning.actions import (
    AdoptPod,
    EndWorker,
    StartWorker,
    StopWorker,
    TerminatePod,
)
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Listing, Market
from openweights.cluster.planning.observation import Demand, Pod, PodCloud, Worker, pod_name
from openweights.cluster.planning.planner import plan
from openweights.gpu_catalogue import CATALOGUE, CLOUDS, Offer

START = datetime(2026, 11, 22, tzinfo=UTC)
STEP_S = 30.0
CHECKPOINT_S = 300.0
LEASE_S = 60.0
FOREIGN = Pod("pod-theirs", "ow-somebody", "RUNNING", 3.0)


@dataclass
class Job:
    """A job and what became of it; `left_s` shrinks as it runs."""

    demand: Demand
    arrives_at: datetime
    left_s: float
    work_s: float
    started_at: datetime | None = None
    ended_at: datetime | None = None
    completions: int = 0


@dataclass
class Machine:
    """A pod, its row and its worker's process.

    Attributes:
        up_at: When its worker registers; None for never.
        dies_at: When the machine goes, without a word.
        mute: From when to when the heartbeats get lost that it sends during a job.
    """

    row: Worker
    pod: Pod | None
    price: float
    up_at: datetime | None
    dies_at: datetime | None
    mute: tuple[datetime, datetime] | None
    job: Job | None = None
    since_s: float = 0.0
    stops_at: datetime | None = None
    idle_s: float = 0.0

    @property
    def is_paid_for(self) -> bool:
        return self.pod is not None and self.pod.is_running


@dataclass
class Day:
    """The state of everything, and what is counted.

    Attributes:
        broken_image: Its workers come up without memory, so that they may take no job.
        restarts: How likely it is in each pass that the manager was started anew, and remembers
            nothing.
        most_idle_s: The longest that a worker was idle before it was asked to end.
    """

    jobs: list[Job]
    limits: Limits
    chance: random.Random
    broken_image: str = ""
    restarts: float = 0.003
    now: datetime = START
    market: Market = field(default_factory=Market)
    machines: dict[str, Machine] = field(default_factory=dict[str, Machine])
    pending: list[Job] = field(default_factory=list[Job])
    arriving: list[Job] = field(default_factory=list[Job])
    prices: dict[tuple[str, PodCloud], float] = field(default_factory=dict)
    gaps: dict[tuple[str, PodCloud], datetime] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter[str])
    usd: float = 0.0
    most_idle_s: float = 0.0
    most_pods: int = 0

    def run(self, most_hours: float) -> None:
        """Until all jobs have ended, and all pods."""
        self.arriving = sorted(self.jobs, key=lambda job: job.arrives_at, reverse=True)
        for gpu in CATALOGUE.values():
            for cloud in CLOUDS:
                if (usd := gpu.usd(cloud)) is not None:
                    self.prices[gpu.key, cloud] = usd
        end = START + timedelta(hours=most_hours)
        step = 0
        while self.now < end and (self.arriving or self.pending or self.machines):
            self._change_prices()
            self._arrive()
            self._work()
            self._claim()
            if step % 2 == 0:
                self._manage()
            self._account()
            self.now += timedelta(seconds=STEP_S)
            step += 1

    # ---- the world -------------------------------------------------------------------------------

    def _change_prices(self) -> None:
        for key in self.prices if self.chance.random() < STEP_S / 7200 else ():
            self.prices[key] *= self.chance.uniform(0.85, 1.18)
        if self.chance.random() < STEP_S / 1800:
            key = self.chance.choice(sorted(self.prices))
            self.gaps[key] = self.now + timedelta(minutes=self.chance.uniform(10, 120))

    def _arrive(self) -> None:
        while self.arriving and self.arriving[-1].arrives_at <= self.now:
            job = self.arriving.pop()
            job.demand = replace(job.demand, waiting_since=self.now)
            self.pending.append(job)

    def _work(self) -> None:
        for machine in self.machines.values():
            if machine.pod is None or not machine.pod.is_running:
                continue
            if machine.dies_at is not None and machine.dies_at <= self.now:
                self.counts["died"] += 1
                machine.pod = replace(machine.pod, status="EXITED")
                continue
            self._beat(machine)
            if machine.job is not None:
                self._advance(machine, machine.job)

    def _beat(self, machine: Machine) -> None:
        row = machine.row
        if row.status == "starting" and machine.up_at is not None and machine.up_at <= self.now:
            count, key = row.hardware_type.split("x ")
            is_broken = row.docker_image == self.broken_image
            vram_gb = 0 if is_broken else int(count) * (CATALOGUE[key].vram_gb - 1)
            row = replace(row, status="active", idle_since=self.now, vram_gb=vram_gb)
        if row.status in ("active", "shutdown"):
            row = replace(row, log_grew_at=self.now if machine.job else None)
            mute = machine.mute
            if machine.job and mute and mute[0] <= self.now < mute[1]:
                self.counts["heartbeats lost"] += 1
            else:
                row = replace(row, pinged_at=self.now)
        if (
            row.status == "shutdown"
            and machine.stops_at is not None
            and machine.stops_at <= self.now
        ):
            row = replace(row, status="terminated")
            self._hand_back(machine, lost_s=0.0)
        machine.row = row

    def _advance(self, machine: Machine, job: Job) -> None:
        job.left_s -= STEP_S
        machine.since_s += STEP_S
        if job.left_s <= 0:
            job.completions += 1
            job.ended_at = self.now
            machine.job = None
            machine.row = replace(machine.row, job=None, run_started_at=None, idle_since=self.now)

    def _hand_back(self, machine: Machine, lost_s: float) -> None:
        job = machine.job
        if job is None:
            return
        job.left_s = min(job.work_s, job.left_s + lost_s)
        job.demand = replace(job.demand, waiting_since=self.now)
        self.pending.append(job)
        machine.job = None
        machine.row = replace(machine.row, job=None, run_started_at=None)

    def _claim(self) -> None:
        self.pending.sort(key=lambda job: (-job.demand.priority, job.arrives_at))
        for machine in self.machines.values():
            if machine.job is not None or machine.row.status != "active" or not machine.is_paid_for:
                continue
            job = next((job for job in self.pending if self._fits(machine.row, job.demand)), None)
            if job is None:
                continue
            self.pending.remove(job)
            job.started_at = job.started_at or self.now
            machine.job, machine.since_s = job, 0.0
            machine.row = replace(
                machine.row,
                job=job.demand,
                has_worked=True,
                run_started_at=self.now,
                idle_since=None,
            )
            row = machine.row
            self.market = self.market.came_up(row.hardware_type, row.cloud_type, row.docker_image)

    def _fits(self, row: Worker, demand: Demand) -> bool:
        if demand.cloud_type == "SECURE" and row.cloud_type == "COMMUNITY":
            return False
        return (
            demand.docker_image == row.docker_image
            and demand.cloud_type in ("ALL", row.cloud_type)
            and demand.requires_vram_gb <= row.vram_gb
            and demand.allowed_hardware in (None, (row.hardware_type,))
        )

    # ---- the manager -----------------------------------------------------------------------------

    def _manage(self) -> None:
        if self.market.needs_refresh(self.now):
            self.market = self.market.restocked(self._listings(), self.now)
        if self.chance.random() < self.restarts:
            self.market = Market()
            self.counts["restarts"] += 1
        pods = [machine.pod for machine in self.machines.values() if machine.pod is not None]
        can_list = self.chance.random() > 0.02
        rows = [machine.row for machine in self.machines.values()]
        jobs = [job.demand for job in self.pending]
        actions = plan(
            jobs, rows, [*pods, FOREIGN] if can_list else None, self.limits, self.market, self.now
        )
        for action in actions:
            if self.chance.random() < 0.01:
                self.counts["crashes"] += 1
                break
            self._apply(action)
        for id in [id for id, m in self.machines.items() if m.pod is None]:
            if self.machines[id].row.status == "terminated":
                del self.machines[id]

    def _apply(self, action: object) -> None:
        match action:
            case StartWorker():
                self._start(action)
            case AdoptPod():
                self.counts["adopted"] += 1
                machine = self.machines[action.worker_id]
                machine.row = replace(machine.row, pod_id=action.pod_id)
            case StopWorker():
                machine = self.machines[action.worker_id]
                self.counts["rotated" if machine.job else "stopped"] += 1
                self.most_idle_s = max(self.most_idle_s, machine.idle_s)
                machine.stops_at = self.now + timedelta(seconds=self.chance.uniform(5, 60))
                machine.row = replace(machine.row, status="shutdown", stopping_since=self.now)
                if action.is_faulty:
                    self._boot_failed(machine.row)
            case EndWorker():
                machine = self.machines[action.worker_id]
                self.counts["lost"] += 1
                if machine.row.status == "active" and machine.is_paid_for:
                    self.counts["killed in good health"] += 1
                lost_s = min(machine.since_s, CHECKPOINT_S)
                machine.row = replace(machine.row, status="terminated")
                self._hand_back(machine, lost_s)
                if action.is_boot_failure:
                    self._boot_failed(machine.row)
            case TerminatePod():
                assert action.pod_id != FOREIGN.id
                machine = self.machines[action.worker_id]
                assert machine.row.status == "terminated"
                machine.pod = None
            case _:
                pass

    def _boot_failed(self, row: Worker) -> None:
        self.market = self.market.boot_failed(
            row.hardware_type, row.cloud_type, row.docker_image, self.now
        )

    def _start(self, action: StartWorker) -> None:
        id = f"w{self.counts['rows']}"
        self.counts["rows"] += 1
        for offer in action.offers:
            if self.market.is_cooling(offer, self.now):
                continue
            row = Worker(
                id,
                "starting",
                action.image,
                offer.hardware_type,
                self.now,
                self.now,
                cloud_type=offer.cloud,
            )
            if self.gaps.get((offer.gpu_key, offer.cloud), START) > self.now:
                self.counts["refused"] += 1
                self.market = self.market.refused(offer, self.now)
                continue
            self.market = self.market.started(offer)
            self.machines[id] = self._machine(id, row, offer)
            return

    def _machine(self, id: str, row: Worker, offer: Offer) -> Machine:
        chance = self.chance
        price = self.prices[offer.gpu_key, offer.cloud] * offer.gpu_count
        row = replace(row, usd_per_hour=price)
        if chance.random() < 0.01:
            self.counts["rows without a pod"] += 1
            return Machine(row, None, price, None, None, None)
        pod = Pod(f"pod-{id}", pod_name(id), "STARTING", price)
        if chance.random() > 0.03:  # else the answer was lost
            row = replace(row, pod_id=pod.id)
        boot_s = chance.uniform(60, 300)
        up_at = None if chance.random() < 0.04 else self.now + timedelta(seconds=boot_s)
        hours = chance.expovariate(1 / (5 if offer.cloud == "COMMUNITY" else 60))
        dies_at = self.now + timedelta(hours=hours)
        mute = None
        if chance.random() < 0.1:
            begins = self.now + timedelta(minutes=chance.uniform(20, 120))
            mute = (begins, begins + timedelta(minutes=chance.uniform(1, 20)))
        return Machine(row, pod, price, up_at, dies_at, mute)

    def _listings(self) -> list[Listing]:
        listings: list[Listing] = []
        for (key, cloud), usd in self.prices.items():
            is_out = self.gaps.get((key, cloud), START) > self.now
            listings.append(Listing(CATALOGUE[key].gpu_id, cloud, "NONE" if is_out else "LOW", usd))
        return listings

    # ---- what is counted -------------------------------------------------------------------------

    def _account(self) -> None:
        pods = 0
        for machine in self.machines.values():
            if machine.is_paid_for:
                pods += 1
                self.usd += machine.price * STEP_S / 3600
            is_idle = machine.row.status == "active" and machine.job is None
            machine.idle_s = machine.idle_s + STEP_S if is_idle and machine.is_paid_for else 0.0
        self.most_pods = max(self.most_pods, pods)
