"""What to do next: from what was seen to a list of actions.

`plan` is a pure function: no I/O, no clock, no chance. It never wants more pods than the limit over
all groups together, starts none for work that a free or starting worker can take, never touches
what no row names, and says of each job that cannot run why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice

from openweights.cluster.planning.actions import Action, ReportJobs, StartWorker, StopWorker
from openweights.cluster.planning.fit import Fit, Group, Need, find_offers, need_of, takes
from openweights.cluster.planning.hardware import canonical_hardware
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.matching import Wanted, WorkerClasses, match_all, usable_gb
from openweights.cluster.planning.observation import Demand, Pod, Worker
from openweights.cluster.planning.reconcile import is_silent, reconcile
from openweights.cluster.planning.scale_down import Idle, make_room, rotate, stop_idle
from openweights.cluster.planning.shares import Holdings, in_turn


def plan(
    jobs: Iterable[Demand],
    workers: Sequence[Worker],
    pods: Sequence[Pod] | None,
    limits: Limits,
    market: Market,
    now: datetime,
) -> tuple[Action, ...]:
    """The actions to apply, in this order.

    Args:
        jobs: Every pending job.
        workers: Every row that has not ended, and of the ended ones those that a pod names. Pods
            are to be listed first, so that a pod's row is always among them.
        pods: Every pod of the account; None when they could not be listed.
        market: See `Market`; its answers about the past are the manager's to keep.
    """
    # Whatever order the store answers in, the plan is the same.
    workers = sorted(workers, key=lambda worker: worker.id)
    found = reconcile(workers, pods, limits, now)
    can_start = pods is not None and not market.is_paused(now)
    pass_ = _Pass(limits, market, now, found.living, found.occupied, can_start)
    wanted = in_claim_order(jobs, limits)
    unmet = pass_.match(wanted)
    broken = pass_.broken(unmet)
    starts, unserved = pass_.serve(unmet, {worker.docker_image for worker, _ in broken})
    stops = pass_.stops(wanted, unserved, broken)
    return (*found.actions, *stops, *starts, *pass_.reports(unmet))


def in_claim_order(jobs: Iterable[Demand], limits: Limits) -> list[Wanted]:
    """As a store hands them out: by priority, then by age."""
    needs: dict[tuple[object, ...], Need] = {}
    wanted: list[Wanted] = []
    for job in sorted(jobs, key=lambda job: (-job.priority, job.waiting_since, job.id)):
        key = (
            job.docker_image,
            job.cloud_type,
            job.requires_vram_gb,
            job.allowed_hardware,
            job.usd_left,
            job.max_usd_per_hour,
        )
        if key not in needs:
            needs[key] = need_of(job, limits.min_run_s)
        wanted.append((job, needs[key]))
    return wanted


@dataclass(slots=True)
class _Pass:
    """One pass over the jobs; each method takes what the one before it has found.

    Attributes:
        occupied: Slots in use.
        spare: Ids of idle workers for which there is no job.
        started: Groups for which a worker is being started.
        fits: The offers that were found for each need.
        everyone: All workers that will go on, free or not.
    """

    limits: Limits
    market: Market
    now: datetime
    living: tuple[Worker, ...]
    occupied: int
    can_start: bool
    spare: frozenset[str] = frozenset()
    started: frozenset[Group] = frozenset()
    fits: dict[Need, Fit] = field(default_factory=dict[Need, Fit])
    holdings: Holdings = field(default_factory=Holdings)
    everyone: WorkerClasses = field(init=False)

    def __post_init__(self) -> None:
        self.everyone = WorkerClasses(self.market)
        self.everyone.add(worker for worker in self.living if worker.status != "shutdown")

    def match(self, wanted: list[Wanted]) -> list[Wanted]:
        """Give jobs to the workers that are free, then to those that are starting; returns the jobs
        for which there is none.
        """
        classes = WorkerClasses(self.market)
        classes.add(worker for worker in self.living if self._is_free(worker))
        by_idle, unmet = match_all(wanted, classes)
        self.spare = frozenset(worker.id for worker in classes.spare())
        classes.add(worker for worker in self.living if self._is_coming(worker))
        by_starting, unmet = match_all(unmet, classes)
        running = [worker.job for worker in self.living if worker.job is not None]
        for demand, need in (*in_claim_order(running, self.limits), *by_idle, *by_starting):
            self.holdings.add(demand, need)
        return unmet

    def broken(self, unmet: list[Wanted]) -> list[tuple[Worker, str]]:
        """Workers that came up with less memory than their pods were rented for, and so leave their
        jobs alone; with the reason. Without this, a pod would be started for the same job again and
        again.
        """
        needed_gb: dict[tuple[str, str, str | None], int] = {}
        for need in dict.fromkeys(need for _, need in unmet):
            for offer in self._fit(need).offers:
                key = (need.pod_image, offer.hardware_type, offer.cloud)
                needed_gb[key] = max(needed_gb.get(key, 0), need.vram_gb)
        found: list[tuple[Worker, str]] = []
        for worker in self.living:
            if worker.id in self.spare and worker.is_managed and not worker.has_worked:
                hardware = canonical_hardware(worker.hardware_type)
                needed = needed_gb.get((worker.docker_image, hardware, worker.cloud_type), 0)
                if worker.vram_gb < needed:
                    reason = f"has {worker.vram_gb} GiB of GPU memory, too little for {hardware}"
                    found.append((worker, reason))
        return found

    def serve(
        self, unmet: list[Wanted], suspects: set[str]
    ) -> tuple[list[StartWorker], list[Wanted]]:
        """Starts for as many as there are slots, and those who could start but for a slot.

        Args:
            suspects: Images that get no workers in this pass.
        """
        if not self.can_start:
            return [], []
        servable = [
            pair
            for pair in unmet
            if self._fit(pair[1]).offers and pair[1].pod_image not in suspects
        ]
        servable = self._one_per_trial(servable)
        slots = max(0, self.limits.max_workers - self.occupied)
        served = list(islice(in_turn(servable, self.holdings), slots)) if slots else []
        starts = [
            StartWorker(need.pod_image, self._fit(need).offers, demand.id)
            for demand, need in served
        ]
        self.started = frozenset(need.group for _, need in served)
        ids = {demand.id for demand, _ in served}
        return starts, [pair for pair in servable if pair[0].id not in ids]

    def _one_per_trial(self, servable: list[Wanted]) -> list[Wanted]:
        """Of jobs whose image keeps failing only the first, and none while a worker of that image
        is coming up: one pod shows as well as many whether it works by now.
        """
        tried = {w.docker_image for w in self.living if w.is_managed and w.status == "starting"}
        kept: list[Wanted] = []
        for pair in servable:
            image = pair[1].pod_image
            if not self.market.is_on_trial(image):
                kept.append(pair)
            elif image not in tried:
                tried.add(image)
                kept.append(pair)
        return kept

    def stops(
        self, wanted: list[Wanted], unserved: list[Wanted], broken: list[tuple[Worker, str]]
    ) -> list[StopWorker]:
        """Workers that are broken, or idle for too long, and those that make room."""
        oldest: dict[Need, datetime] = {}
        for demand, need in wanted:
            oldest[need] = min(oldest.get(need, demand.waiting_since), demand.waiting_since)
        stops = [StopWorker(worker.id, reason, is_faulty=True) for worker, reason in broken]
        ids = {stop.worker_id for stop in stops}
        idle = [
            Idle(worker, worker.id in self.spare, self._oldest_for(worker, oldest))
            for worker in self.living
            if worker.is_managed and self._is_free(worker) and worker.id not in ids
        ]
        stops += stop_idle(idle, self.limits, self.now)
        going_on = sum(w.is_managed and w.status != "shutdown" for w in self.living)
        freed = self.occupied - going_on + len(stops)
        ids = {stop.worker_id for stop in stops}
        rest = [entry for entry in idle if entry.worker.id not in ids]
        stops += make_room(rest, len(unserved) - freed)
        starved = [
            pair
            for pair in unserved
            if pair[1].group not in self.started and not self.everyone.suitable(pair[1])
        ]
        freed = self.occupied - going_on + len(stops)
        return stops + rotate(starved, self.living, self.limits, self.now, freed=freed)

    def reports(self, unmet: list[Wanted]) -> list[ReportJobs]:
        """Jobs for which no pod can be started, whatever the limit; but for those that some worker
        will take when it is done with what it does.
        """
        if self.market.is_paused(self.now) and unmet:
            reason = (
                f"the spending limit is reached; tried again at {self.market.paused_until:%H:%M}"
            )
            return [ReportJobs(tuple(demand.id for demand, _ in unmet), reason, can_wait=True)]
        without: dict[Need, list[str]] = {}
        for demand, need in unmet:
            if not self._fit(need).offers and not self.everyone.suitable(need):
                without.setdefault(need, []).append(demand.id)
        return [
            ReportJobs(tuple(ids), self._fit(need).reason, self._fit(need).can_wait)
            for need, ids in without.items()
        ]

    def _fit(self, need: Need) -> Fit:
        if need not in self.fits:
            self.fits[need] = find_offers(need, self.market, self.now)
        return self.fits[need]

    def _is_free(self, worker: Worker) -> bool:
        if worker.status != "active" or worker.job is not None:
            return False
        return not is_silent(worker, self.limits, self.now)

    def _is_coming(self, worker: Worker) -> bool:
        if worker.status != "starting":
            return False
        # Ours is ended in time when it does not come; nobody may be there to end another's.
        return worker.is_managed or not is_silent(worker, self.limits, self.now)

    def _oldest_for(self, worker: Worker, oldest: dict[Need, datetime]) -> datetime | None:
        idle_since = worker.idle_since or worker.created_at
        if worker.id in self.spare or self.now - idle_since < timedelta(seconds=self.limits.idle_s):
            return None  # and nobody asks
        vram_gb = usable_gb(worker, self.market)
        return min(
            (at for need, at in oldest.items() if takes(worker, need, vram_gb)), default=None
        )
