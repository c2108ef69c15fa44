"""Random clusters for the planner's tests, and rules written down a second time, slowly.

Nothing here uses what the planner decides with: its answers are checked against these.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import Demand, Pod, PodStatus, Worker, pod_name
from openweights.cluster.planning.planner import plan
from openweights.gpu_catalogue import CATALOGUE, Offer
from openweights.types import WorkerStatus

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LIMITS = Limits(max_workers=4)
IMAGES = ("train:1", "serve:1")
ROOMY = {"A100": 75, "H100S": 75, "H200": 136, "A40": 43}  # sure memory of one


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def demand(number: int = 0, **changes: Any) -> Demand:
    return replace(Demand(f"job-{number}", IMAGES[0], ago(100 - number)), **changes)


def worker(number: int = 0, **changes: Any) -> Worker:
    """A healthy idle one, up for half an hour."""
    idle = Worker(
        f"w{number}",
        "active",
        IMAGES[0],
        "1x A100",
        ago(1800),
        ago(5),
        vram_gb=80,
        cloud_type="SECURE",
        pod_id=f"pod-{number}",
        usd_per_hour=1.79,
        has_worked=True,
        idle_since=ago(30),
    )
    return replace(idle, **changes)


def busy(number: int, job: Demand, **changes: Any) -> Worker:
    changes = {"idle_since": None, "run_started_at": ago(600), **changes}
    return worker(number, job=job, **changes)


def pod_of(w: Worker, status: PodStatus = "RUNNING") -> Pod:
    return Pod(w.pod_id or f"pod-{w.id}", pod_name(w.id), status, w.usd_per_hour)


@dataclass(frozen=True)
class World:
    """What one pass sees."""

    jobs: tuple[Demand, ...]
    workers: tuple[Worker, ...]
    pods: tuple[Pod, ...] | None
    limits: Limits = LIMITS
    market: Market = Market()

    def plan(self) -> tuple[Any, ...]:
        return plan(self.jobs, self.workers, self.pods, self.limits, self.market, NOW)


# ---- rules, a second time ------------------------------------------------------------------------


def can_take(w: Worker, job: Demand) -> bool:
    """As the SQL of `claim_job` has it; hardware in these worlds is written in one way."""
    return (
        (job.docker_image in ("", w.docker_image) or w.docker_image in ("", "dev"))
        and (w.cloud_type is None or job.cloud_type in ("ALL", w.cloud_type))
        and (job.allowed_hardware is None or w.hardware_type in job.allowed_hardware)
        and job.requires_vram_gb <= memory_gb(w)
        and (job.usd_left is None or job.usd_left > 0)
    )


def memory_gb(w: Worker) -> int:
    if w.status != "starting":
        return w.vram_gb
    count, gpu = w.hardware_type.split("x ")
    return int(count) * ROOMY[gpu]


def most_jobs(workers: Sequence[Worker], jobs: Sequence[Demand]) -> int:
    """How many of the jobs the workers can take, one each: the textbook's matching."""
    holder: dict[str, int] = {}

    def place(index: int, tried: set[str]) -> bool:
        for w in workers:
            if w.id in tried or not can_take(w, jobs[index]):
                continue
            tried.add(w.id)
            if w.id not in holder or place(holder[w.id], tried):
                holder[w.id] = index
                return True
        return False

    return sum(place(index, set()) for index in range(len(jobs)))


def fits(offer: Offer, job: Demand, market: Market, limits: Limits) -> bool:
    """Whether a pod is right for a job: memory, tier, hardware, money."""
    gpu = market.gpus[offer.gpu_key]
    price = gpu.secure_usd if offer.cloud == "SECURE" else gpu.community_usd
    hours = limits.min_run_s / 3600
    return (
        price is not None
        and abs(offer.usd_per_hour - price * offer.gpu_count) < 1e-3
        and offer.gpu_count * (gpu.vram_gb - 5) >= job.requires_vram_gb
        and job.cloud_type in ("ALL", offer.cloud)
        and (job.allowed_hardware is None or offer.hardware_type in job.allowed_hardware)
        and (job.usd_left is None or job.usd_left >= offer.usd_per_hour * hours - 1e-6)
    )


def every_offer(market: Market) -> list[Offer]:
    """All pods of 1, 2, 4 and 8 GPUs that may be chosen or named in these worlds."""
    offers: list[Offer] = []
    for gpu, count in itertools.product(market.gpus.values(), (1, 2, 4, 8)):
        if gpu.secure_usd is not None:
            usd = count * gpu.secure_usd
            offers.append(Offer(gpu.key, gpu.gpu_id, count, "SECURE", usd, 0))
        if gpu.community_usd is not None:
            usd = count * gpu.community_usd
            offers.append(Offer(gpu.key, gpu.gpu_id, count, "COMMUNITY", usd, 0))
    return offers


def can_be_rented(job: Demand, market: Market, limits: Limits) -> bool:
    """Whether some pod would do: only pods of as few GPUs as will do, unless hardware is named."""
    offers = every_offer(market)
    if job.allowed_hardware is not None:
        return any(fits(offer, job, market, limits) for offer in offers)
    offers = [offer for offer in offers if market.gpus[offer.gpu_key].is_automatic]
    free = replace(job, usd_left=None)
    large = [offer for offer in offers if fits(offer, free, market, limits)]
    fewest = min((offer.gpu_count for offer in large), default=0)
    return any(fits(o, job, market, limits) for o in large if o.gpu_count == fewest)


# ---- random worlds -------------------------------------------------------------------------------

hardware_lists = st.sampled_from(
    [None, None, ("1x A100",), ("1x H200", "1x H100S"), ("2x A40",), ("1x TPU",)]
)
demands = st.builds(
    Demand,
    id=st.just(""),
    docker_image=st.sampled_from([*IMAGES, ""]),
    waiting_since=st.integers(0, 5000).map(ago),
    cloud_type=st.sampled_from(["SECURE", "COMMUNITY", "ALL"]),
    requires_vram_gb=st.sampled_from([0, 24, 70, 100, 500, 5000]),
    allowed_hardware=hardware_lists,
    priority=st.integers(0, 1),
    owner=st.sampled_from(["ann", "bob"]),
    usd_left=st.sampled_from([None, None, None, 0.0, 0.3, 5.0]),
)


@st.composite
def workers(draw: st.DrawFn, number: int) -> Worker:
    """Of any status, in any health; the row and the pod need not agree. They have the memory that
    their hardware promises: what becomes of broken ones has tests of its own.
    """
    status = draw(st.sampled_from(_WORKER_STATUSES))
    is_busy = status in ("active", "shutdown") and draw(st.booleans())
    age = draw(st.sampled_from([5, 100, 500, 2500]))
    is_managed = draw(st.sampled_from([True, True, True, False]))
    job = replace(draw(demands), id=f"held-{number}")
    hardware, vram_gb = draw(st.sampled_from([("1x A100", 80), ("1x H200", 141), ("2x A40", 88)]))
    return Worker(
        f"w{number}",
        status,
        draw(st.sampled_from([*IMAGES, "dev"])),
        hardware,
        ago(age),
        ago(min(age, draw(st.sampled_from([1, 1, 1, 90, 400, 2400])))),
        vram_gb=0 if status == "starting" else vram_gb,
        cloud_type=draw(st.sampled_from(["SECURE", "COMMUNITY"])) if is_managed else None,
        pod_id=f"pod-{number}" if is_managed and draw(st.integers(0, 4)) else None,
        usd_per_hour=draw(st.sampled_from([None, 0.5, 3.0])),
        is_managed=is_managed,
        job=job if is_busy else None,
        has_worked=is_busy or draw(st.booleans()),
        run_started_at=ago(draw(st.integers(0, age))) if is_busy else None,
        idle_since=ago(draw(st.integers(0, age))) if status == "active" and not is_busy else None,
        log_grew_at=ago(draw(st.integers(0, age))) if is_busy and draw(st.booleans()) else None,
        stopping_since=ago(draw(st.integers(0, age))) if status == "shutdown" else None,
    )


@st.composite
def worlds(draw: st.DrawFn, max_jobs: int = 8) -> World:
    jobs = draw(st.lists(demands, max_size=max_jobs))
    rows = [draw(workers(number)) for number in range(draw(st.integers(0, 5)))]
    pods = [Pod("pod-x", "somebody-else", "RUNNING"), Pod("pod-y", "ow-unknown", "RUNNING")]
    for w in rows:
        # none, its own, one that was never recorded, or both
        for name, is_there in zip((w.pod_id, f"late-{w.id}"), draw(_PRESENCE), strict=True):
            if name and is_there and w.is_managed:
                status: PodStatus = draw(
                    st.sampled_from(["STARTING", "RUNNING", "RUNNING", "EXITED"])
                )
                pods.append(Pod(name, pod_name(w.id), status))
    return World(
        tuple(replace(job, id=f"job-{number}") for number, job in enumerate(jobs)),
        tuple(rows),
        tuple(pods),
        Limits(max_workers=draw(st.integers(0, 6))),
    )


_POD_STATUSES: tuple[PodStatus, ...] = ("STARTING", "RUNNING", "RUNNING", "EXITED")
_pod_statuses = st.sampled_from(_POD_STATUSES)
_WORKER_STATUSES: tuple[WorkerStatus, ...] = (
    *("starting", "active", "active", "active", "shutdown", "terminated"),
)
_PRESENCE = st.sampled_from(
    [(True, False), (True, False), (False, False), (False, True), (True, True)]
)

assert ROOMY.items() <= {gpu.key: gpu.vram_gb - 5 for gpu in CATALOGUE.values()}.items()
