"""Weighted SFT and DPO on two processes take the steps that one takes with all rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.jobs.unsloth.runtime import two_ranks_step_mean
from tests.jobs.unsloth.runtime.test_ranks import launch
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    launch(2, "two_ranks_step_mean.py", model, str(tmp_path), "1")
    two = json.loads((tmp_path / "log.json").read_text())
    one, half = (two_ranks_step_mean.main(model, tmp_path, batch) for batch in (2, 1))
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 8 * 60, steps=3)
    for name, keys in (("sft", ["loss", "grad_norm"]), ("dpo", ["loss", "rewards/margins"])):
        for key in keys:
            ours, theirs = ([entry[key] for entry in log[name]] for log in (two, one))
            # A margin is what is left of log-probabilities of whole answers.
            size = abs(one[name][0]["logps/chosen"]) if key == "rewards/margins" else None
            assert_sums_equal(ours, theirs, terms, size=size, about=f"{name} {key}")
        assert len(one[name]) == 3 and one[name][2]["loss"] < one[name][0]["loss"]
    # Control: one process with half of the rows at each step goes elsewhere.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(half["sft"][0]["loss"], one["sft"][0]["loss"], terms)
