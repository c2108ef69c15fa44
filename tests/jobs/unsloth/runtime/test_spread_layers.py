"""A model whose layers are spread over two processes trains as one that each of them has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.jobs.unsloth.runtime.forked_ranks import ForkedRanks
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model

RUNS = "tests.jobs.unsloth.runtime.two_ranks_spread:runs"
STEPS = "tests.jobs.unsloth.runtime.two_ranks_spread:steps"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_jobs_train_as_with_a_model_on_each_rank(
    ranks: ForkedRanks, model: Path, tmp_path: Path
) -> None:
    saved: dict[str, list[dict[str, Any]]] = {}
    for layers in ("whole", "spread"):
        ranks.run(2, RUNS, str(model), str(tmp_path / layers), layers)
        files = (tmp_path / layers / f"rank-{rank}.json" for rank in range(2))
        saved[layers] = [json.loads(file.read_text()) for file in files]
    for loss, whole in saved["whole"][0].items():
        first, second = (own[loss] for own in saved["spread"])
        # The same numbers, added in the same order.
        assert first["weights"] == second["weights"] == whole["weights"]
        assert len(whole["log"]) == 2
        for one, also in zip(first["log"], whole["log"], strict=True):
            timed = {key for key in one if key.endswith("_s")}
            assert {k: one[k] for k in one.keys() - timed} == {
                k: also[k] for k in also.keys() - timed
            }
        assert first["own"] == second["own"] == whole["matrices"] / 2 and whole["own"] == 0
        other = saved["whole"][1][loss]
        assert [first["sampled"], second["sampled"]] == [whole["sampled"], other["sampled"]]
        # Layers are gathered by all: who has fewer rows to pass through them joins the others.
        assert first["passes"] == second["passes"]
        uneven = whole["passes"] != other["passes"]
        assert uneven == (loss != "dpo"), "the control: with models of their own they do not"


def test_steps_equal_one_process_and_resume_in_it(
    ranks: ForkedRanks, model: Path, tmp_path: Path
) -> None:
    def run(number: int, name: str, batch_size: int = 2, resume_from: str = "") -> dict[str, Any]:
        folder, layers = tmp_path / name, "spread" if number == 2 else "whole"
        resume = str(tmp_path / resume_from / "out" / "checkpoint-2") if resume_from else ""
        size = str(batch_size // number)
        ranks.run(number, STEPS, str(model), str(folder), size, layers, resume)
        return torch.load(folder / "weights.pt")

    one, two = run(1, "one"), run(2, "two")
    two_then_one = run(1, "two then one", resume_from="two")
    one_then_two = run(2, "one then two", resume_from="one")
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 4 * 100, steps=4)
    for found in (two, two_then_one, one_then_two):
        assert_sums_equal(found, one, terms)
    # The control: the rows of one of the two lead elsewhere.
    half = run(1, "half", batch_size=1)
    for part in ("student", "teacher"):
        with pytest.raises(AssertionError, match="differs by"):
            assert_sums_equal(half[part], one[part], terms)
