"""What can be rented now: the catalogue with the prices and the stock last heard of, and what is
being left alone because it kept failing.

Immutable: each answer of a provider makes a new `Market`, and the clock is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

from openweights.cluster.planning.cooldown import Cooldowns, Key
from openweights.cluster.planning.hardware import canonical_hardware, known_hardware
from openweights.cluster.planning.observation import PodCloud
from openweights.gpu_catalogue import CATALOGUE, GPU_COUNTS, Gpu, Offer, surely_usable_gb
from openweights.gpu_names import gpu_key

REFRESH_S = 900.0
# While something is being left alone because it was sold out.
ANXIOUS_REFRESH_S = 120.0
# What is listed as in stock rests no longer than this, however often it was refused.
LISTED_REST_S = 1200.0
# An answer about stock says nothing any more after this long.
STALE_S = 1800.0
SPENDING_PAUSE_S = 300.0

StockLevel = Literal["HIGH", "MEDIUM", "LOW", "NONE"]


@dataclass(frozen=True, slots=True)
class Listing:
    """What a provider says of one GPU type on one tier.

    Attributes:
        gpu_id: RunPod's name.
        stock: No promise either way.
        usd_per_hour: Price of one GPU; None when it was not told.
    """

    gpu_id: str
    cloud: PodCloud
    stock: StockLevel
    usd_per_hour: float | None = None


def _empty() -> Mapping[tuple[str, PodCloud], datetime]:
    return MappingProxyType({})


def _no_sizes() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Market:
    """What the manager keeps between two passes.

    Attributes:
        gpus: By key.
        sold_out_at: When a GPU type was last listed as out of stock on a tier.
        sizes_gb: Memory of one GPU as workers measured it, where that is less than the catalogue
            lets expect.
        capacity: No-capacity failures, by hardware and tier.
        boots: Failures of pods that came, by hardware and tier, and by image.
        paused_until: Nothing is started before: the account has reached its spending limit.
        refreshed_at: Of prices and stock.
    """

    gpus: Mapping[str, Gpu] = field(default_factory=lambda: CATALOGUE)
    sold_out_at: Mapping[tuple[str, PodCloud], datetime] = field(default_factory=_empty)
    sizes_gb: Mapping[str, int] = field(default_factory=_no_sizes)
    capacity: Cooldowns = field(default_factory=Cooldowns)
    boots: Cooldowns = field(default_factory=Cooldowns)
    paused_until: datetime | None = None
    refreshed_at: datetime | None = None

    # ---- what is known ---------------------------------------------------------------------------

    def usable_gb(self, gpu: Gpu) -> int:
        """Memory of one GPU that a job can surely use."""
        sure = surely_usable_gb(gpu)
        return min(sure, self.sizes_gb.get(gpu.key, sure))

    def is_sold_out(self, offer: Offer, now: datetime) -> bool:
        """Whether the provider said so lately."""
        said_at = self.sold_out_at.get((offer.gpu_key, offer.cloud))
        return said_at is not None and now - said_at < timedelta(seconds=STALE_S)

    def rests_until(self, offer: Offer, now: datetime) -> datetime | None:
        """When the offer may be asked for again; None if it may be now."""
        key = (offer.hardware_type, offer.cloud)
        moments = [table.rests_until(key, now) for table in (self.capacity, self.boots)]
        return max((moment for moment in moments if moment is not None), default=None)

    def is_cooling(self, offer: Offer, now: datetime) -> bool:
        """Whether the offer is to be left alone."""
        return self.rests_until(offer, now) is not None

    def image_rests_until(self, image: str, now: datetime) -> datetime | None:
        """When pods with this image may be started again; None if they may be now."""
        return self.boots.rests_until(_of_image(image), now)

    def is_paused(self, now: datetime) -> bool:
        """Whether the spending limit forbids every start."""
        return self.paused_until is not None and now < self.paused_until

    def needs_refresh(self, now: datetime) -> bool:
        """Whether prices and stock are to be asked for again."""
        refreshed_at = self.refreshed_at
        is_waiting = any(now < entry.rests_until for entry in self.capacity.failures.values())
        refresh_s = ANXIOUS_REFRESH_S if is_waiting else REFRESH_S
        return refreshed_at is None or now - refreshed_at >= timedelta(seconds=refresh_s)

    def is_on_trial(self, image: str) -> bool:
        """Whether pods with this image have failed so often that they are tried one at a time."""
        return self.boots.is_on_trial(_of_image(image))

    # ---- what was learned ------------------------------------------------------------------------

    def refused(self, offer: Offer, now: datetime) -> Market:
        """There was no capacity for it."""
        key = (offer.hardware_type, offer.cloud)
        return replace(self, capacity=self.capacity.failed(key, now))

    def started(self, offer: Offer) -> Market:
        """There was capacity for it."""
        return replace(self, capacity=self.capacity.succeeded((offer.hardware_type, offer.cloud)))

    def boot_failed(
        self, hardware_type: str, cloud: PodCloud | None, image: str, now: datetime
    ) -> Market:
        """A pod came, and no working worker with it. Whether hardware or image is to blame is not
        known, so both are counted.
        """
        boots = self.boots.failed(_of_image(image), now)
        if cloud is not None:
            boots = boots.failed((canonical_hardware(hardware_type), cloud), now)
        return replace(self, boots=boots)

    def came_up(self, hardware_type: str, cloud: PodCloud | None, image: str) -> Market:
        """A worker has run a job."""
        boots = self.boots.succeeded(_of_image(image))
        if cloud is not None:
            boots = boots.succeeded((canonical_hardware(hardware_type), cloud))
        return replace(self, boots=boots)

    def spending_limit(self, now: datetime) -> Market:
        """The account may not spend more. That says nothing about the hardware."""
        return replace(self, paused_until=now + timedelta(seconds=SPENDING_PAUSE_S))

    def to_keep(self) -> dict[str, Any]:
        """What has to outlive the manager, as JSON: what keeps failing, and so costs money."""
        return {"boots": self.boots.to_keep(), "market": self.to_show()}

    def to_show(self) -> dict[str, Any]:
        """Prices and stock as JSON, for people who plan; empty before they were asked for."""
        if self.refreshed_at is None:
            return {}
        return {
            "at": self.refreshed_at.isoformat(),
            "usd": {key: [gpu.secure_usd, gpu.community_usd] for key, gpu in self.gpus.items()},
            "sold_out": [[*key, at.isoformat()] for key, at in sorted(self.sold_out_at.items())],
        }

    def with_shown(self, shown: Mapping[str, Any]) -> Market:
        """With the prices and the stock that `to_show` has given; the same without them."""
        if "at" not in shown:
            return self
        gpus = dict(self.gpus)
        for key, (secure, community) in shown["usd"].items():
            if key in gpus:
                gpus[key] = replace(gpus[key], secure_usd=secure, community_usd=community)
        sold_out = {
            (key, cloud): datetime.fromisoformat(at) for key, cloud, at in shown["sold_out"]
        }
        return replace(
            self,
            gpus=MappingProxyType(gpus),
            sold_out_at=MappingProxyType(sold_out),
            refreshed_at=datetime.fromisoformat(shown["at"]),
        )

    def recalled(self, kept: Mapping[str, Any], now: datetime) -> Market:
        """With what `to_keep` has given."""
        return replace(self, boots=Cooldowns.recalled(kept.get("boots"), now))

    def restocked(self, listings: Iterable[Listing], now: datetime) -> Market:
        """Take over prices and stock. GPU types that the catalogue does not have are ignored; those
        that are not listed stay as they are.
        """
        gpus = dict(self.gpus)
        sold_out = dict(self.sold_out_at)
        capacity = self.capacity
        for listing in listings:
            key = gpu_key(listing.gpu_id)
            if key is None or key not in gpus:
                continue
            if listing.usd_per_hour:  # a price of 0 is one that was not set
                gpus[key] = _priced(gpus[key], listing.cloud, listing.usd_per_hour, now)
            if listing.stock == "NONE":
                sold_out[key, listing.cloud] = now
                continue
            # News of stock ends the rest; an old claim of it only shortens it.
            is_news = sold_out.pop((key, listing.cloud), None) is not None
            until = now if is_news else now + timedelta(seconds=LISTED_REST_S)
            capacity = capacity.eased(_sizes(key, listing.cloud), until)
        return replace(
            self,
            capacity=capacity,
            gpus=MappingProxyType(gpus),
            sold_out_at=MappingProxyType(sold_out),
            refreshed_at=now,
        )

    def measured(self, hardware_type: str, vram_gb: int) -> Market:
        """A worker of this hardware has said how much memory it has, in all.

        Without this, a GPU that is smaller than expected would be rented again and again for a job
        that its worker may not take. Half of what was expected, or less, is a broken machine and
        says nothing about the others.
        """
        found = known_hardware(hardware_type)
        gpu = None if found is None else self.gpus.get(found[1])
        if found is None or gpu is None:
            return self
        size_gb = vram_gb // found[0]
        if not gpu.vram_gb // 2 < size_gb < self.usable_gb(gpu):
            return self
        return replace(self, sizes_gb=MappingProxyType({**self.sizes_gb, gpu.key: size_gb}))


def _sizes(gpu_key: str, cloud: PodCloud) -> set[Key]:
    return {(f"{count}x {gpu_key}", cloud) for count in range(1, GPU_COUNTS[-1] + 1)}


def _of_image(image: str) -> Key:
    return ("image", image)


def _priced(gpu: Gpu, cloud: PodCloud, usd: float, now: datetime) -> Gpu:
    if cloud == "SECURE":
        return replace(gpu, secure_usd=usd, seen_on=now.date())
    return replace(gpu, community_usd=usd, seen_on=now.date())
