"""What a job would cost, and when it would run, before it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.client.watching.plan import Plan, least
from openweights.cluster.planning.market import Listing, Market
from openweights.types import Claim
from tests.client.conftest import QuietClient, append, every_store  # noqa: F401 - a fixture
from tests.client.kinds import Echo

Take = Callable[[], Claim]
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
NOW = datetime(2026, 11, 1, tzinfo=UTC)


def test_a_plan_submits_nothing(ow: QuietClient, claim: Take) -> None:
    kind = Echo(ow)
    ahead = kind.create(text="ahead")
    plan = kind.plan(text="a", requires_vram_gb=24, max_duration=7200)
    same: Any = kind.create(text="a", requires_vram_gb=24, max_duration=7200, dry_run=True)
    assert isinstance(same, Plan) and same.offers == plan.offers
    assert [job.id for job in ow.jobs.list(limit=None)] == [ahead.id]
    assert (plan.status, plan.jobs_before, plan.expected_s) == (None, 1, None)
    assert plan.job_id == kind.create(text="a").id
    assert kind.plan(text="a").status == "pending"
    again = kind.plan(text="a", requires_vram_gb=24)
    assert again.jobs_before == 1 and again.waits_for == plan.waits_for, "not behind itself"
    assert "exists, pending\nit waits " in "\n".join(again.words())
    lines = "\n".join(plan.words())
    assert f"job {plan.job_id}: new" in lines and "no job like it has completed" in lines
    if ow.backend.team is None:
        assert (plan.offers, plan.waits_for, plan.most_usd) == ((), f"behind {ahead.id}", 0.0)
        return
    cheapest = plan.offers[0]
    prices = [offer.usd_per_hour for offer in plan.offers]
    assert prices == sorted(prices) and plan.priced_at is None
    assert plan.most_usd == pytest.approx(3 * 2 * prices[-1]), "three runs on the dearest"
    assert f"pod: {cheapest.hardware} on SECURE, ${cheapest.usd_per_hour:.2f} an hour" in lines
    nothing = kind.plan(text="b", requires_vram_gb=24, max_usd_per_hour=0.01)
    assert nothing.offers == () and "max_usd_per_hour is 0.01" in nothing.reason
    assert nothing.most_usd is None


def test_a_job_that_is_there_waits_for_others_only(ow: QuietClient, claim: Take) -> None:
    kind = Echo(ow)
    kind.create(text="a", label="few", max_running=1)
    claim()
    plan = kind.plan(text="a", label="few", max_running=1)
    assert (plan.status, plan.jobs_before) == ("in_progress", 0)
    assert "few" not in plan.waits_for and "behind" not in plan.waits_for
    [line] = plan.words()
    assert line.endswith("exists, in progress; `create` gives that one, and nothing new is run")


def test_an_earlier_job_says_how_long_it_takes(
    ow: QuietClient, claim: Take, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW * 8)
    params: dict[str, Any] = {"model": "org/tiny", "training_file": str(rows), "loss": "sft"}
    params |= {"requires_vram_gb": 0, "max_steps": 2}
    unknown = ow.fine_tuning.plan(**params)
    assert (unknown.expected_s, unknown.like) == (None, None)
    ow.fine_tuning.create(**params)
    held = claim()
    append(ow.backend, held.run.id, {"type": "started", "max_steps": 2, "from_step": 0})
    append(ow.backend, held.run.id, {"step": 2, "loss": 1.0})
    ow.backend.finish_run(held.run.id, 1, "completed")
    plan = ow.fine_tuning.plan(**params | {"max_steps": 200})
    if ow.backend.team is None:
        assert plan.like == held.job.id and plan.expected_usd == 0.0
        assert f", reckoned from {held.job.id}" in "\n".join(plan.words())


def test_prices_are_those_that_the_manager_has_heard_of(ow: QuietClient) -> None:
    if ow.backend.team is None:
        return
    listings = [
        Listing("NVIDIA A40", "SECURE", "NONE", 0.11),
        Listing("NVIDIA GeForce RTX 3090", "SECURE", "HIGH", 0.2),
    ]
    now = ow.backend.now()
    cast("Any", ow.backend).set_manager_state(Market().restocked(listings, now).to_keep())
    plan = Echo(ow).plan(text="a", requires_vram_gb=18)
    assert plan.priced_at == now
    by_name = {offer.hardware: offer for offer in plan.offers}
    assert by_name["1x A40"].usd_per_hour == 0.11 and by_name["1x A40"].is_sold_out
    assert (plan.offers[0].hardware, plan.offers[0].usd_per_hour) == ("1x RTX3090", 0.2)
    named = Echo(ow).plan(text="a", allowed_hardware="1x A40")
    assert "1x A40 on SECURE, $0.11 an hour, sold out when last asked" in "\n".join(named.words())


def test_what_is_shown_of_a_market_is_read_again() -> None:
    market = Market().restocked([Listing("NVIDIA A40", "SECURE", "NONE", 0.5)], NOW)
    again = Market().with_shown(market.to_show())
    assert dict(again.sold_out_at) == dict(market.sold_out_at)
    assert again.gpus["A40"].secure_usd == 0.5 and again.refreshed_at == NOW
    assert Market().with_shown({}) == Market() and Market().to_show() == {}


amounts = st.one_of(st.none(), st.floats(0, 1e6))


@given(amounts, amounts)
def test_the_least_of_what_is_given(a: float | None, b: float | None) -> None:
    given_ones = [x for x in (a, b) if x is not None]
    assert least(a, b) == (min(given_ones) if given_ones else None)
