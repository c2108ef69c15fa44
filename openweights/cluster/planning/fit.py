"""Which pods fit a job, and which workers may take it.

`takes` is the rule by which a store's `claim_job` hands out jobs: if the two differed, the planner
would wait for a worker that never takes the job, or rent pods without end.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from openweights.cluster.planning.hardware import canonical_hardware, parse_hardware
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import ANY_IMAGE, Demand, Worker
from openweights.errors import InvalidInputError
from openweights.gpu_catalogue import GPU_COUNTS, Offer, fitting_offers, make_offers
from openweights.images import UNSLOTH_IMAGE
from openweights.types import CloudType

Group = tuple[str, CloudType, tuple[str, ...] | int]


# Compared by identity: one pass makes one of each, and looks them up by the hundred thousand.
@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """What demands have in common that the same workers can take.

    Attributes:
        hardware: Canonical, sorted; None for any that has the memory.
        most_usd_per_hour: A dearer pod could not be paid for long enough; None for no limit.
        cap_usd_per_hour: A dearer pod is not wanted; None for no limit.
    """

    image: str
    cloud_type: CloudType
    vram_gb: int
    hardware: tuple[str, ...] | None
    most_usd_per_hour: float | None
    cap_usd_per_hour: float | None = None

    @property
    def group(self) -> Group:
        """Groups get equal shares of the workers."""
        return (self.image, self.cloud_type, self.hardware or self.vram_gb)

    @property
    def pod_image(self) -> str:
        """Of a pod that is started for it: a job that names none runs in any."""
        return self.image or UNSLOTH_IMAGE


@dataclass(frozen=True, slots=True)
class Fit:
    """Attributes:
    offers: To be asked for now, best first.
    reason: Why there are none.
    can_wait: False when nothing will ever fit the job as it is.
    """

    offers: tuple[Offer, ...] = ()
    reason: str = ""
    can_wait: bool = True


def need_of(demand: Demand, min_run_s: float) -> Need:
    """What a demand needs.

    Args:
        min_run_s: What is left to be spent must buy a pod for this long.
    """
    named = demand.allowed_hardware
    return Need(
        demand.docker_image,
        demand.cloud_type,
        demand.requires_vram_gb,
        None if named is None else tuple(sorted({canonical_hardware(name) for name in named})),
        None if demand.usd_left is None else max(demand.usd_left, 0.0) * 3600 / min_run_s,
        demand.max_usd_per_hour,
    )


def takes(worker: Worker, need: Need, vram_gb: int) -> bool:
    """Whether a worker may take such a job.

    Args:
        vram_gb: The memory of all its GPUs.
    """
    if need.image not in ("", worker.docker_image) and worker.docker_image not in ANY_IMAGE:
        return False
    if worker.cloud_type is not None and need.cloud_type not in (worker.cloud_type, "ALL"):
        return False
    if need.hardware is not None and canonical_hardware(worker.hardware_type) not in need.hardware:
        return False
    has_money = need.most_usd_per_hour is None or need.most_usd_per_hour > 0
    cap, price = need.cap_usd_per_hour, worker.usd_per_hour or 0.0
    return need.vram_gb <= vram_gb and has_money and (cap is None or price <= cap)


def find_offers(need: Need, market: Market, now: datetime) -> Fit:
    """The pods that fit, cheapest first; those said to be sold out come last."""
    rest = market.image_rests_until(need.pod_image, now)
    possible = _named(need, market) if need.hardware is not None else _automatic(need, market)
    if isinstance(possible, str):
        return Fit(reason=possible, can_wait=False)
    cap, most = need.cap_usd_per_hour, need.most_usd_per_hour
    wanted = [offer for offer in possible if cap is None or offer.usd_per_hour <= cap]
    if not wanted:
        return Fit(reason=_over_the_cap(possible, cap or 0.0))  # prices change
    affordable = [offer for offer in wanted if most is None or offer.usd_per_hour <= most]
    if not affordable:
        return Fit(reason=_too_dear(wanted, most or 0.0), can_wait=False)
    if rest is not None:
        return Fit(
            reason=f"workers of {need.pod_image} keep failing; the next is tried at {rest:%H:%M}"
        )
    awake = [offer for offer in affordable if not market.is_cooling(offer, now)]
    if not awake:
        return Fit(reason=_sold_out(affordable, market, now))
    return Fit(tuple(sorted(awake, key=lambda offer: _rank(offer, market, now))))


# ---- possible offers -----------------------------------------------------------------------------


def _automatic(need: Need, market: Market) -> list[Offer] | str:
    gpus = market.gpus.values()
    if fitting := fitting_offers(gpus, need.vram_gb, need.cloud_type, market.usable_gb):
        return fitting
    automatic = [gpu for gpu in gpus if gpu.is_automatic]
    most_gpus = make_offers(automatic, GPU_COUNTS[-1], need.cloud_type, market.usable_gb)
    largest = max(most_gpus, key=_size, default=None)
    most = "none" if largest is None else f"{largest.vram_gb} GiB, {largest.hardware_type}"
    return (
        f"needs {need.vram_gb} GiB of GPU memory, and the most that is chosen on "
        f"{need.cloud_type} is {most}; lower requires_vram_gb or name allowed_hardware"
    )


def _named(need: Need, market: Market) -> list[Offer] | str:
    offers: list[Offer] = []
    wrong: list[str] = []
    for name in need.hardware or ():
        try:
            count, key = parse_hardware(name)
        except InvalidInputError as error:
            wrong.append(f"allowed_hardware: {error}")
            continue
        found = make_offers([market.gpus[key]], count, need.cloud_type, market.usable_gb)
        fitting = [offer for offer in found if offer.vram_gb >= need.vram_gb]
        offers += fitting
        if not found:
            wrong.append(f"{name} is not on offer on {need.cloud_type}")
        elif not fitting:
            wrong.append(
                f"{name} has {found[0].vram_gb} GiB for sure, the job needs {need.vram_gb}"
            )
    if offers:
        return offers
    return "; ".join(wrong) + ". Change allowed_hardware, requires_vram_gb or cloud_type"


# ---- order, money, reasons -----------------------------------------------------------------------


def _rank(offer: Offer, market: Market, now: datetime) -> tuple[bool, float, str, str]:
    sold_out = market.is_sold_out(offer, now)
    return (sold_out, offer.usd_per_hour, offer.hardware_type, offer.cloud)


def _size(offer: Offer) -> int:
    return offer.vram_gb


def _over_the_cap(offers: list[Offer], cap: float) -> str:
    cheapest = min(offers, key=lambda offer: offer.usd_per_hour)
    return (
        f"the cheapest pod that fits, {cheapest.hardware_type} on {cheapest.cloud}, costs "
        f"${cheapest.usd_per_hour:.2f} an hour, and max_usd_per_hour is {cap:g}; raise it, or wait "
        "for prices to fall"
    )


def _too_dear(offers: list[Offer], most: float) -> str:
    cheapest = min(offers, key=lambda offer: offer.usd_per_hour)
    return (
        f"what is left of its money pays at most ${most:.2f} an hour for a useful run, and the "
        f"cheapest pod that fits, {cheapest.hardware_type} on {cheapest.cloud}, costs "
        f"${cheapest.usd_per_hour:.2f}; raise max_cost_usd or the key's budget"
    )


def _sold_out(offers: list[Offer], market: Market, now: datetime) -> str:
    first = min(moment for offer in offers if (moment := market.rests_until(offer, now)))
    names = ", ".join(sorted({f"{offer.hardware_type} on {offer.cloud}" for offer in offers}))
    return f"no pod to be had of {names}; asked for again at {first:%H:%M}"
