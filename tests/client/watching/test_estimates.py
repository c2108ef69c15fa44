"""What a job is likely to take, before it has run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from openweights.client import Job
from openweights.client.watching.estimates import Estimate, Pace, possible_offers, priced
from openweights.client.watching.progress import Progress
from openweights.client.watching.waiting import note_on
from openweights.gpu_catalogue import CATALOGUE
from openweights.types import Claim, EventDraft, JobSpec
from tests.client.conftest import QuietClient

Take = Callable[[], Claim]


def create(ow: QuietClient, **params: Any) -> Job:
    """16 rows of about 25 tokens each, two of them in a step."""
    asked = {"role": "user", "content": "q" * 20}
    rows = [{"messages": [asked, {"role": "assistant", "content": f"{n:05}"}]} for n in range(16)]
    given = {"model": "org/name", "loss": "sft", "gradient_accumulation_steps": 1, **params}
    file = ow.files.upload(rows, "conversations")["id"]
    return ow.fine_tuning.create(training_file=file, **given)


def complete(ow: QuietClient, claim: Take, *, steps: int, seconds: float) -> Job:
    """Play the worker of the next job: so many steps in so many seconds."""
    taken = claim()
    end = datetime.now(UTC)
    start = end - timedelta(seconds=seconds)
    drafts = [
        EventDraft("a", {"type": "started", "max_steps": steps, "from_step": 0}, start),
        EventDraft("b", {"step": steps, "loss": 1.0}, end),
    ]
    ow.backend.append_events(taken.run.id, drafts)
    ow.backend.finish_run(taken.run.id, taken.run.attempt, "completed")
    return ow.jobs.retrieve(taken.job.id)


def test_time_is_that_of_an_earlier_job(ow: QuietClient, claim: Take) -> None:
    first = create(ow)
    assert first.estimate == Estimate(
        steps=8, tokens=first.estimate.tokens if first.estimate else 0
    )
    assert first.estimate and first.estimate.words() == "8 steps"
    complete(ow, claim, steps=8, seconds=20)
    longer = create(ow, epochs=3).estimate
    assert longer and longer.seconds == pytest.approx(60, abs=2) and longer.like == first.id
    wider = create(ow, per_device_train_batch_size=4).estimate
    assert wider and wider.steps == 4 and wider.seconds == pytest.approx(20, abs=1)
    assert wider.words().startswith("4 steps · about ")
    # Another loss, and another model, are other work.
    for other in ({"loss": "sdft"}, {"model": "org/other"}):
        found = create(ow, **other).estimate
        assert found and found.seconds is None
    sampled = create(ow, loss="sdft", sdft_max_new_tokens=50, max_seq_length=64).estimate
    assert sampled and sampled.tokens == pytest.approx(wider.tokens / 2 + 2 * 50, abs=1)


def test_who_waits_is_told_until_the_steps_tell(ow: QuietClient, claim: Take) -> None:
    create(ow)
    earlier = complete(ow, claim, steps=8, seconds=20).id
    job = create(ow, epochs=3).record
    note = note_on(job, Progress(), "behind ftjob-0")
    assert note.startswith("behind ftjob-0 · about ") and note.endswith(
        f", reckoned from {earlier}"
    )
    lost = "worker w is gone; attempt 2, from step 4"
    assert note_on(job, Progress(), "", lost) == lost, "the whole is no measure of what is left"
    now = datetime.now(UTC)
    began, first = now - timedelta(seconds=5), now - timedelta(seconds=2)
    going = Progress(step=2, began_at=began, first_step=1, first_at=first, reached_at=now)
    assert note_on(job, going, "") == ""


def spec(**changes: Any) -> JobSpec:
    params = {"validated_params": {}, "cloud_type": changes.pop("cloud_type", "SECURE")}
    return JobSpec(id="ftjob-1", type="fine-tuning", script="", params=params, **changes)


def test_price_is_that_of_the_cheapest_pod_or_of_the_earlier_one() -> None:
    job = spec(requires_vram_gb=40)
    cheapest = min(offer.usd_per_hour for offer in possible_offers(job))
    bare = priced(Estimate(10, 100), job, None)
    assert (bare.usd_per_hour, bare.usd, bare.vram_gb) == (cheapest, None, 40)
    assert (
        bare.words() == f"10 steps · 40 GB of GPU memory · ${cheapest:.2f} an hour on 1x A40 SECURE"
    )
    # As on the GPU on which an earlier job was measured: time and price are those of that one.
    timed = Estimate(10, 100, seconds=1800.0, like="ftjob-0")
    pace = Pace("ftjob-0", "1x H200", 0.01, 0.0)
    found = priced(timed, job, pace)
    price = CATALOGUE["H200"].secure_usd
    assert price and found.usd == pytest.approx(price / 2) and found.hardware == "1x H200 SECURE"
    assert found.words().endswith(
        "0s, reckoned from ftjob-0 · 40 GB of GPU memory · "
        f"about ${price / 2:.2f} on 1x H200 SECURE"
    )
    # On others nobody knows the time.
    elsewhere = priced(timed, spec(allowed_hardware=("1x A100",)), pace)
    assert (elsewhere.seconds, elsewhere.usd, elsewhere.hardware) == (None, None, "1x A100 SECURE")


def test_nothing_fits() -> None:
    assert priced(Estimate(10, 100), spec(requires_vram_gb=10**6), None).hardware is None
    both = possible_offers(spec(allowed_hardware=("2x H100S", "1x NOSUCH"), cloud_type="ALL"))
    assert {offer.cloud for offer in both} == {"SECURE", "COMMUNITY"}
    assert {offer.gpu_count for offer in both} == {2}
    assert Estimate.of({}) is None and Estimate.of({"estimate": {"steps": 1}}) is None
