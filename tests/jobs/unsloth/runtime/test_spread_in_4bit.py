"""Layers that are spread in nf4 compute with the numbers of one dense model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S
from tests.warm.stack import ROOT


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_passes_equal_those_of_a_dense_model_with_the_same_numbers(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    ranks = min(2, torch.cuda.device_count() or 2)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    module = "tests.jobs.unsloth.runtime.ranks_in_4bit"
    done = subprocess.run(
        [sys.executable, *launch, "-m", module, str(model), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "passes.pt")
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 40)
    assert_sums_equal(found["spread"], found["dense"], terms)
    # The control: nf4 rounds to other numbers than those of the checkpoint.
    with pytest.raises(AssertionError, match="differs by"):
        assert_sums_equal(found["unrounded"], found["dense"], terms)
    sizes = found["sizes"]
    assert sizes["own_bytes"] <= sizes["matrices"] / 2 / ranks * 1.01
