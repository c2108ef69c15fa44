"""Weighted SFT and DPO on two processes take the steps that one takes with all rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.unsloth.runtime import two_ranks_step_mean
from tests.jobs.unsloth.runtime.test_ranks import launch
from tests.tiny_model import make_tiny_model


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    launch(2, "two_ranks_step_mean.py", model, str(tmp_path), "1")
    two = json.loads((tmp_path / "log.json").read_text())
    one, half = (two_ranks_step_mean.main(model, tmp_path, batch) for batch in (2, 1))
    for name, keys in (("sft", ["loss", "grad_norm"]), ("dpo", ["loss", "rewards/margins"])):
        for key in keys:
            ours, theirs = ([entry[key] for entry in log[name]] for log in (two, one))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (name, key)
        assert len(one[name]) == 3 and one[name][2]["loss"] < one[name][0]["loss"]
    # Control: one process with half of the rows at each step goes elsewhere.
    assert abs(half["sft"][0]["loss"] - one["sft"][0]["loss"]) > 1e-3
