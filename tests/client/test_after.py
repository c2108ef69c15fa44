"""Jobs that wait for others, as users say it and are told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import ConfigError, InvalidInputError, InvalidStateError, JobFailedError
from openweights.client.watching.queue import waits_for
from openweights.types import Claim, Retry
from tests.client.conftest import QuietClient, append, every_store  # noqa: F401 - a fixture
from tests.client.kinds import Echo
from tests.waiting import HANGS_S

Take = Callable[[], Claim]
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'


def tell(ow: QuietClient, job: Any) -> str:
    return waits_for(ow.backend, job.refresh().record, is_remote=ow.settings.is_remote)


def test_jobs_in_order(ow: QuietClient, claim: Take) -> None:
    kind = Echo(ow)
    first = kind.create(text="first")
    second = kind.create(text="second", after=first, priority=9)
    third = kind.create(text="third", after=[first.id, second, first])
    assert (second.after, third.after) == ((first.id,), (first.id, second.id))
    assert tell(ow, second) == f"for {first.id} (pending)"
    assert tell(ow, third) == f"for {first.id} (pending) and 1 more"
    held = claim()
    assert held.job.id == first.id
    assert tell(ow, second) == f"for {first.id} (in progress)"
    other = kind.create(text="other")
    # What waits for other jobs is nobody's turn before it.
    assert tell(ow, other) in (f"behind {first.id}", "for a worker (SECURE)")
    ow.backend.finish_run(held.run.id, 1, "failed", error="exit code 3: boom")
    for job in (second, third):
        with pytest.raises(JobFailedError, match="it was to come after job .*, which has failed"):
            job.wait(timeout=HANGS_S)
    with pytest.raises(InvalidStateError, match=f"ow restart {first.id}"):
        second.restart()
    first.restart()
    assert second.refresh().status == third.refresh().status == "pending"


def test_what_cannot_be_waited_for(ow: QuietClient) -> None:
    kind = Echo(ow)
    with pytest.raises(InvalidInputError, match="after: there is no job 'nix'"):
        kind.create(text="a", after="nix")
    for wrong in (3, None, [3], [None], [["job-1"]], {"x": 1}, {"job-1"}, b"job-1"):
        with pytest.raises(ConfigError, match="^after: .* is no job; give jobs, or their ids$"):
            kind.create(text="a", after=wrong)
    canceled = kind.create(text="b").cancel()
    with pytest.raises(InvalidStateError, match=f"job {canceled.id} is canceled"):
        kind.create(text="c", after=canceled)
    # What would only be planned is looked at as closely.
    with pytest.raises(InvalidInputError, match="after: there is no job 'nix'"):
        kind.create(text="a", after="nix", dry_run=True)
    with pytest.raises(InvalidStateError, match=f"job {canceled.id} is canceled"):
        kind.plan(text="c", after=canceled)
    assert len(ow.jobs.list(limit=None)) == 1


def test_a_model_that_is_still_trained_is_waited_for(
    ow: QuietClient, claim: Take, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    params: dict[str, Any] = {"training_file": str(rows), "loss": "sft", "requires_vram_gb": 0}
    first = ow.fine_tuning.create(model="org/tiny", **params)
    early = ow.fine_tuning.create(model=first.id, **params)
    assert (early.after, early.model) == ((first.id,), first.id)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(ROW)
    ask: dict[str, Any] = {"input_file_id": str(questions), "requires_vram_gb": 0}
    asked = ow.inference.create(model=early.id, after=first, **ask)
    assert asked.after == (first.id, early.id)
    compared = ow.evaluate.create(models=["org/tiny", early.id], suite="gsm8k")
    assert compared.after == (early.id,)
    # A checkpoint that is there needs no waiting.
    held = claim()
    file = ow.files.create(b"x", "checkpoint")["id"]
    append(ow.backend, held.run.id, {"type": "checkpoint", "step": 4, "file": file, "path": "x"})
    now = ow.inference.create(model=f"{first.id}/checkpoint-4", **ask)
    assert now.after == ()
    assert ow.inference.newest(first.id) == f"{first.id}/checkpoint-4"
    ow.backend.finish_run(held.run.id, 1, "completed")
    # The same job, whether it was submitted before or after what it goes on from has completed.
    assert ow.fine_tuning.create(model=first.id, **params).id == early.id
    assert claim().job.id in (early.id, now.id)


def test_how_a_job_runs_as_users_write_it(ow: QuietClient) -> None:
    kind = Echo(ow)
    job = kind.create(
        text="a",
        retry={"max": 2, "backoff_s": 5, "on": ["any", "exit:75"]},
        not_before=3600,
        label="sweep",
        max_running=2,
        max_duration=7200,
        stall_timeout_s=60,
    )
    assert job.retry == Retry(2, 5.0, ("any", "exit:75"))
    assert (job.label, job.max_running, job.max_duration_s) == ("sweep", 2, 7200)
    assert job.stall_timeout_s == 60 and job.not_before is not None
    assert 3590 < (job.not_before - ow.backend.now()).total_seconds() <= 3600
    assert tell(ow, job).startswith("until 2")
    assert kind.create(text="b", retry=1).retry == Retry(1)
    usual = kind.create(text="c", stall_timeout_s=0)
    assert (usual.retry, usual.stall_timeout_s, usual.not_before) == (None, None, None)
    for wrong, said in (
        ({"retry": {"mx": 1}}, "says no retries; write a number, or"),
        ({"retry": {"max": 1, "on": ["rain"]}}, "'rain' is no cause; choose among any, oom"),
        ({"retry": {"max": -1}}, "retry.max: -1 is not between"),
        ({"max_running": 2}, "counts the jobs that share a label"),
        ({"stall_timeout_s": -1}, "stall_timeout_s: must be at least 0"),
        ({"not_before": "tomorrow"}, "not_before"),
    ):
        with pytest.raises(ConfigError, match=said):
            kind.create(text="d", **wrong)
    with pytest.raises(InvalidInputError, match="not_before: .* is no number of seconds from now"):
        kind.create(text="d", not_before=1e300)


def test_training_may_be_quiet_for_half_an_hour(ow: QuietClient, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW)
    params: dict[str, Any] = {"model": "org/tiny", "training_file": str(rows), "loss": "sft"}
    assert ow.fine_tuning.create(**params).stall_timeout_s == 1800
    assert ow.fine_tuning.create(**params, stall_timeout_s=0).stall_timeout_s is None
