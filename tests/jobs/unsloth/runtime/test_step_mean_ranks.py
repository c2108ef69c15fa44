"""Weighted SFT and DPO on two processes take the steps that one takes with all rows, with a model
on each of them and with one whose layers are spread over both.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.warm.stack import WarmStack

STEPS = "tests.jobs.unsloth.runtime.two_ranks_step_mean:main"


def test_two_ranks_equal_one_process(stack: WarmStack, tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    logs = []
    runs = ((2, "whole", "1"), (2, "spread", "1"), (1, "whole", "2"), (1, "whole", "1"))
    for number, layers, batch_size in runs:
        folder = tmp_path / str(len(logs))
        stack.run(number, STEPS, model, str(folder), batch_size, layers)
        logs.append(json.loads((folder / "log.json").read_text()))
    two, spread, one, half = logs
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 8 * 60, steps=3)
    for name, keys in (("sft", ["loss", "grad_norm"]), ("dpo", ["loss", "rewards/margins"])):
        for key in keys:
            ours, parts, theirs = ([e[key] for e in log[name]] for log in (two, spread, one))
            # A margin is what is left of log-probabilities of whole answers.
            size = abs(one[name][0]["logps/chosen"]) if key == "rewards/margins" else None
            for found in (ours, parts):
                assert_sums_equal(found, theirs, terms, size=size, about=f"{name} {key}")
        assert len(one[name]) == 3 and one[name][2]["loss"] < one[name][0]["loss"]
    # Control: one process with half of the rows at each step goes elsewhere.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(half["sft"][0]["loss"], one["sft"][0]["loss"], terms)
