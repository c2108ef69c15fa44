"""Names of hardware, the catalogue, the ladder of rests, and what the market remembers."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.cluster.planning.cooldown import LONGEST_REST_S, PATIENCE, Cooldowns
from openweights.cluster.planning.fit import Need, find_offers, need_of, takes
from openweights.cluster.planning.hardware import canonical_hardware, parse_hardware
from openweights.cluster.planning.market import STALE_S, Listing, Market
from openweights.cluster.planning.observation import Demand
from openweights.errors import InvalidInputError
from openweights.gpu_catalogue import CATALOGUE, Offer
from openweights.gpu_names import LONG_NAMES, gpu_key
from tests.cluster.random_clusters import NOW, demand, worker

IMAGE = "train:1"


def offers(market: Market | None = None, at: datetime = NOW, **changes: Any) -> list[Offer]:
    need = need_of(demand(**changes), 900)
    return list(find_offers(need, market or Market(), at).offers)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2x A100", (2, "A100")),
        ("a100s", (1, "A100S")),
        (" 8 X h100s ", (8, "H100S")),
        ("1x A100 SXM 80GB", (1, "A100S")),
        ("4x H100 NVL", (4, "H100N")),
        ("RTX 4090", (1, "RTX4090")),
        ("1x 4090", (1, "RTX4090")),
        ("1x 6000Ada", (1, "6000ADA")),
        ("NVIDIA RTX 6000 Ada Generation", (1, "6000ADA")),
        ("1x a4000_sff", (1, "A4000_SFF")),
        ("2x NVIDIA H100 80GB HBM3", (2, "H100S")),
    ],
)
def test_hardware_strings(text: str, expected: tuple[int, str]) -> None:
    assert parse_hardware(text) == expected
    assert canonical_hardware(text) == f"{expected[0]}x {expected[1]}"


@pytest.mark.parametrize("text", ["A100 40GB", "TPU", "0x A100", "", "2x", "99x A100", "x A100"])
def test_what_is_no_hardware_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_hardware(text)
    assert canonical_hardware(text) == text.upper()


@given(st.sampled_from(sorted(CATALOGUE)), st.integers(1, 64), st.booleans())
def test_every_key_and_long_name_is_read_in_any_case(key: str, count: int, is_lower: bool) -> None:
    for name in (key, LONG_NAMES[key]):
        if name is not key and not name.replace("-", "").replace(" ", "").isalnum():
            continue
        text = f"{count}x {name.lower() if is_lower else name}"
        assert parse_hardware(text) == (count, key)


def test_no_name_means_two_gpus() -> None:
    for key, long_name in LONG_NAMES.items():
        assert gpu_key(key) == key
        assert gpu_key(long_name) == key
    assert gpu_key("A100-SXM4-40GB") is None


def test_the_catalogue_is_complete_and_dated() -> None:
    assert CATALOGUE.keys() == LONG_NAMES.keys()
    for key, gpu in CATALOGUE.items():
        assert gpu.key == key
        assert gpu.secure_usd is None or 0.1 < gpu.secure_usd < 20
        assert gpu.community_usd is None or 0.1 < gpu.community_usd <= (gpu.secure_usd or 20)
        assert 6 <= gpu.vram_gb <= 300
        assert gpu.seen_on.year == 2026
    chosen = {key for key, gpu in CATALOGUE.items() if gpu.is_automatic}
    assert {"A100", "A100S", "H100S", "H200", "A40"} <= chosen


# ---- fit -----------------------------------------------------------------------------------------


def test_five_gb_of_each_gpu_are_not_counted_on() -> None:
    names = {offer.gpu_key for offer in offers(requires_vram_gb=75)}
    assert "A100" in names
    assert "A100" not in {offer.gpu_key for offer in offers(requires_vram_gb=76)}
    two = offers(requires_vram_gb=150, allowed_hardware=("2x A100",))
    assert [offer.vram_gb for offer in two] == [150]
    assert offers(requires_vram_gb=151, allowed_hardware=("2x A100",)) == []


def test_one_gpu_before_two_and_the_cheapest_first() -> None:
    found = offers(requires_vram_gb=40)
    assert {offer.gpu_count for offer in found} == {1}
    assert found[0].hardware_type == "1x A40"
    assert [offer.usd_per_hour for offer in found] == sorted(o.usd_per_hour for o in found)


def test_named_hardware_is_taken_whatever_its_order_and_spelling() -> None:
    names = ("1x H200", "1x A100 SXM 80GB")
    assert [o.hardware_type for o in offers(allowed_hardware=names)] == ["1x A100S", "1x H200"]
    need = need_of(demand(allowed_hardware=names), 900)
    assert takes(worker(hardware_type="1x A100S"), need, 80)
    assert not takes(worker(hardware_type="2x A100S"), need, 160)


@given(st.floats(0, 20), st.floats(60, 7200))
def test_what_is_left_must_buy_a_useful_run(usd_left: float, min_run_s: float) -> None:
    need = need_of(demand(cloud_type="ALL", usd_left=usd_left), min_run_s)
    for offer in find_offers(need, Market(), NOW).offers:
        assert offer.usd_per_hour * min_run_s / 3600 <= usd_left * (1 + 1e-9)


def test_a_worker_said_to_be_smaller_is_not_rented_again() -> None:
    job: dict[str, Any] = {"requires_vram_gb": 70, "allowed_hardware": ("1x A100",)}
    assert offers(**job)
    assert offers(Market().measured("1x A100", 60), **job) == []
    assert offers(Market().measured("2x A100", 160), **job), "more than expected changes nothing"
    assert offers(Market().measured("1x A100", 0), **job), "a broken machine says nothing"
    assert Market().measured("cpu", 0) == Market()


# ---- rests ---------------------------------------------------------------------------------------


def test_the_ladder() -> None:
    table, key, now = Cooldowns(), ("1x A100", "SECURE"), NOW
    rests: list[float] = []
    for _ in range(PATIENCE + 9):
        table = table.failed(key, now)
        until = table.rests_until(key, now)
        rests.append((until - now).total_seconds() / 60 if until else 0)
        assert until is None or table.failed(key, now) == table, "asked for before the rest began"
        now = until or now
        assert table.rests_until(key, now) is None, "afterwards it may be tried again"
    assert rests == [0, 0, *(2**step for step in range(PATIENCE + 7))]
    assert table.succeeded(key) == Cooldowns()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(0, 90_000))))
def test_rests_end_and_do_not_spread(steps: list[tuple[str, bool, int]]) -> None:
    table, now = Cooldowns(), NOW
    in_a_row = {"a": 0, "b": 0}
    for name, is_failure, pause_s in steps:
        key = (name, "SECURE")
        is_resting = table.rests_until(key, now) is not None
        table = table.failed(key, now) if is_failure else table.succeeded(key)
        if not is_failure:
            in_a_row[name] = 0
        elif not is_resting:
            in_a_row[name] += 1
        until = table.rests_until(key, now)
        assert (until is None) == (in_a_row[name] < PATIENCE)
        assert until is None or until <= now + timedelta(seconds=LONGEST_REST_S)
        now += timedelta(seconds=pause_s)
    assert all(table.rests_until((n, "SECURE"), now + timedelta(days=1)) is None for n in "ab")


def test_failures_are_those_of_one_hardware_on_one_tier() -> None:
    job: dict[str, Any] = {"cloud_type": "ALL", "allowed_hardware": ("1x A100", "2x A100")}
    first = offers(**job)[0]
    market = Market().refused(first, NOW).refused(first, NOW)
    assert first in offers(market, **job)
    market = market.refused(first, NOW)
    assert market.is_cooling(first, NOW)
    assert offers(market, **job) == offers(**job)[1:]
    assert offers(market, later(60), **job) == offers(**job)
    assert offers(market.started(first), **job) == offers(**job)


def test_pods_that_never_work_put_image_and_hardware_to_rest() -> None:
    market = Market()
    for hardware in ("1x A100", "1x A40", "1x H200"):
        market = market.boot_failed(hardware, "SECURE", IMAGE, NOW)
    assert market.image_rests_until(IMAGE, NOW) == later(60)
    assert offers(market) == []
    assert offers(market, docker_image="other:1"), "the hardware has failed only once each"
    assert offers(market.came_up("1x A40", "SECURE", IMAGE))
    reason = find_offers(need_of(demand(), 900), market, NOW)
    assert "keep failing" in reason.reason
    assert reason.can_wait


def test_the_spending_limit_pauses_and_counts_nothing() -> None:
    market = Market().spending_limit(NOW)
    assert market.is_paused(later(299))
    assert not market.is_paused(later(300))
    assert replace(market, paused_until=None) == Market()


# ---- prices and stock ----------------------------------------------------------------------------


def test_what_is_sold_out_comes_last_and_for_a_while() -> None:
    cheapest = offers()[0]
    listing = Listing(cheapest.gpu_id, cheapest.cloud, "NONE", cheapest.usd_per_hour)
    market = Market().restocked([listing], NOW)
    assert offers(market)[-1] == cheapest
    assert offers(market)[0] == offers()[1]
    assert offers(market, later(STALE_S))[0] == cheapest, "the answer is stale"
    again = market.restocked([replace(listing, stock="LOW")], later(10))
    assert offers(again, later(10))[0] == cheapest


def test_prices_are_those_of_the_last_answer() -> None:
    listings = [
        Listing(CATALOGUE["H200"].gpu_id, "SECURE", "HIGH", 0.1),
        Listing(CATALOGUE["A40"].gpu_id, "COMMUNITY", "LOW", 0.2),
        Listing(CATALOGUE["A100"].gpu_id, "SECURE", "LOW", 0.0),
        Listing("NVIDIA Future 9000", "SECURE", "HIGH", 0.01),
    ]
    market = Market().restocked(listings, NOW)
    assert offers(market)[0].hardware_type == "1x H200"
    assert market.gpus["H200"].seen_on == NOW.date()
    assert offers(market, cloud_type="COMMUNITY", requires_vram_gb=40)[0].usd_per_hour == 0.2
    assert market.gpus["A100"] == CATALOGUE["A100"], "a price of 0 is none"
    assert CATALOGUE["H200"].secure_usd != 0.1, "the catalogue itself stays"


def test_answers_are_asked_for_again() -> None:
    assert Market().needs_refresh(NOW)
    market = Market().restocked([], NOW)
    assert not market.needs_refresh(later(899))
    assert market.needs_refresh(later(900))


def test_a_demand_is_what_a_stored_job_asks_for() -> None:
    need = need_of(Demand("a", "", datetime(2026, 1, 1, tzinfo=UTC)), 900)
    assert isinstance(need, Need)
    assert need.pod_image
