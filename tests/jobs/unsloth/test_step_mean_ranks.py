"""Weighted SFT and DPO on two processes take the steps that one takes with all rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.unsloth import two_ranks_step_mean
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
OWN = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *command, two_ranks_step_mean.__file__, model, str(tmp_path), "1"],
        env={**os.environ, **OWN},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "log.json").read_text())
    one, half = (two_ranks_step_mean.main(model, tmp_path, batch) for batch in (2, 1))
    for name, keys in (("sft", ["loss", "grad_norm"]), ("dpo", ["loss", "rewards/margins"])):
        for key in keys:
            ours, theirs = ([entry[key] for entry in log[name]] for log in (two, one))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (name, key)
        assert len(one[name]) == 3 and one[name][2]["loss"] < one[name][0]["loss"]
    # Control: one process with half of the rows at each step goes elsewhere.
    assert abs(half["sft"][0]["loss"] - one["sft"][0]["loss"]) > 1e-3
