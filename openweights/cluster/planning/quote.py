"""What could be rented for a job that nobody has submitted yet. Pure, as all of planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from openweights.cluster.planning.fit import find_offers, need_of
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import Demand, PodCloud
from openweights.types import JobRecord


@dataclass(frozen=True, slots=True)
class Quote:
    """A pod that could be asked for.

    Attributes:
        hardware: Such as "2x A100S".
        usd_per_hour: Of the whole pod.
        is_sold_out: The provider said so when it was last asked.
    """

    hardware: str
    cloud_type: PodCloud
    usd_per_hour: float
    is_sold_out: bool


def quotes(
    job: JobRecord, market: Mapping[str, Any], now: datetime
) -> tuple[tuple[Quote, ...], str, datetime | None]:
    """The pods that fit a job, best first; why there are none; and when prices were seen.

    Args:
        market: What the manager has published (`Market.to_show`); empty for the catalogue's prices.
    """
    known = Market().with_shown(market)
    fit = find_offers(need_of(Demand.of(job), Limits().min_run_s), known, now)
    found = tuple(
        Quote(offer.hardware_type, offer.cloud, offer.usd_per_hour, known.is_sold_out(offer, now))
        for offer in fit.offers
    )
    return found, fit.reason, known.refreshed_at
