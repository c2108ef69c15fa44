"""A model whose layers are spread over two processes trains as one that each of them has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.warm.stack import WarmStack

RUNS = "tests.jobs.unsloth.runtime.two_ranks_spread:runs"
STEPS = "tests.jobs.unsloth.runtime.two_ranks:main"
ADAMW = {
    "max_steps": 4,
    "save_steps": 2,
    "keep_checkpoints": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.05,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_jobs_train_as_with_a_model_on_each_rank(
    stack: WarmStack, model: Path, tmp_path: Path
) -> None:
    saved: dict[str, list[dict[str, Any]]] = {}
    for layers in ("whole", "spread", "no room"):
        stack.run(2, RUNS, str(model), str(tmp_path / layers), layers)
        files = (tmp_path / layers / f"rank-{rank}.json" for rank in range(2))
        saved[layers] = [json.loads(file.read_text()) for file in files]
    for loss, whole in saved["whole"][0].items():
        other = saved["whole"][1][loss]
        for layers in ("spread", "no room") if loss == "sdft" else ("spread",):
            first, second = (own[loss] for own in saved[layers])
            # The same numbers, added in the same order.
            assert first["weights"] == second["weights"] == whole["weights"]
            assert len(whole["log"]) == 2
            for one, also in zip(first["log"], whole["log"], strict=True):
                assert untimed(one) == untimed(also)
            assert first["own"] == second["own"] == whole["matrices"] / 2 and whole["own"] == 0
            assert [first["sampled"], second["sampled"]] == [whole["sampled"], other["sampled"]]
            # Layers are gathered by all: who has fewer rows to pass through them joins the others,
            # but for what is sampled where all layers have been gathered.
            alone = (layers, loss) == ("spread", "sdft")
            assert (first["passes"] == second["passes"]) != alone
        uneven = whole["passes"] != other["passes"]
        assert uneven == (loss != "dpo"), "the control: with models of their own they do not"


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not key.endswith("_s")}


def test_steps_equal_one_process_and_resume_in_it(
    stack: WarmStack, model: Path, tmp_path: Path
) -> None:
    def run(number: int, name: str, batch_size: int = 2, resume_from: str = "") -> dict[str, Any]:
        folder, layers = tmp_path / name, "spread" if number == 2 else "whole"
        resume = str(tmp_path / resume_from / "out" / "checkpoint-2") if resume_from else ""
        changes = {**ADAMW, "per_device_train_batch_size": batch_size // number}
        stack.run(number, STEPS, str(model), str(folder), json.dumps(changes), layers, resume)
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
