"""The rows of a step are dealt over ranks evenly, and sampled and scored as by one process."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.jobs.unsloth.rollout import StepSampler
from openweights.jobs.unsloth.runtime.ranks import even_shares
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.warm.stack import WarmStack

STEPS = "tests.jobs.unsloth.runtime.two_ranks_rollouts:main"


def spread(shares: list[list[int]], sizes: list[float]) -> float:
    """How far the largest sum of a rank is from the smallest."""
    sums = [sum(sizes[row] for row in share) for share in shares]
    return max(sums) - min(sums)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 8, 31, 64])
def test_shares_are_within_one_row_of_each_other(ranks: int, rows: int) -> None:
    draw = random.Random(rows)
    for _ in range(20):
        sizes = [min(512.0, draw.expovariate(1 / 150)) for _ in range(rows)]
        shares = even_shares(sizes, ranks)
        assert sorted(row for share in shares for row in share) == list(range(rows))
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        shortest = min(sizes) if rows % ranks == 0 else 0.0
        assert spread(shares, sizes) <= max(sizes) - shortest + 1e-6


def test_dealing_in_the_order_of_the_rows_is_not_within_one_row() -> None:
    """The control: what each rank had before."""
    draw = random.Random(0)
    sizes = [min(512.0, draw.expovariate(1 / 150)) for _ in range(64)]
    in_order = [list(range(32)), list(range(32, 64))]
    assert spread(in_order, sizes) > max(sizes) - min(sizes)
    assert spread(even_shares(sizes, 2), sizes) < 10


class LengthsEngine:
    """Completions as long as the first token of the prompt says."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.asked = [request.prompt_ids[0] for request in requests]
        return [[Completion([7] * r.prompt_ids[0], "", "stop")] * r.params.n for r in requests]


def test_prompts_are_expected_to_be_answered_as_they_were_the_last_time() -> None:
    engine: Any = LengthsEngine()
    sampler = StepSampler(engine, SamplingParams(max_new_tokens=9, detokenize=False))
    prompts = [[3, 1], [8, 1], [5, 1], [5, 1]]
    for asked in ([5, 3, 8], [5, 8, 3]):
        rollout = sampler.sample(prompts, None, seed=(1,))
        assert [len(one.token_ids) for one in rollout.completions] == [3, 8, 5, 5]
        assert rollout.own == [0, 1, 2, 3] and rollout.tokens == 21
        # Twice five tokens are more than eight; at first all are expected to be equally long.
        assert engine.asked == asked


def test_two_ranks_sample_and_score_as_one_process(stack: WarmStack, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    told: dict[str, dict[str, Any]] = {}
    for number, name, batch_size in ((1, "one", "8"), (2, "two", "4"), (1, "half", "4")):
        stack.run(number, STEPS, str(model), str(tmp_path / name), batch_size)
        told[name] = json.loads((tmp_path / name / "told.json").read_text())
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 16 * 60, steps=3)
    for loss, keys in (
        ("sdft", ("loss", "grad_norm", "completion_length", "entropy", "eos_share")),
        ("grpo", ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length")),
    ):
        one, two, half = (told[name][loss] for name in ("one", "two", "half"))
        drawn = [[e for e in run["events"] if e["type"] == "completions"] for run in (two, one)]
        assert drawn[0] == drawn[1], "the same completions, whoever has drawn them"
        assert len({entry[keys[2]] for entry in one["log"]}) == 3
        for key in keys:
            ours, theirs, fewer = ([e[key] for e in run["log"]] for run in (two, one, half))
            assert_sums_equal(ours, theirs, terms, about=f"{loss} {key}")
            # The control: the rows that one of the two begins with lead elsewhere.
            with pytest.raises(AssertionError, match="differs by"):
                assert_sums_equal(fewer, theirs, terms)
        assert all(entry["rollout_waiting_s"] >= 0 for entry in two["log"])
        assert not any("rollout_waiting_s" in entry for entry in one["log"])
