"""Two processes train as one does, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]


def launch(processes: int, *arguments: str) -> None:
    """With gloo on the CPU; a process that hangs is a failure, not a wait."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [str(Path(__file__).with_name("two_ranks.py")), *arguments]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *script],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    log = json.loads((folder / "log.json").read_text())
    return torch.load(folder / "weights.pt"), [entry for entry in log if "divergence" in entry]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    launch(1, str(model), str(tmp_path / "one"), "2")
    launch(2, str(model), str(tmp_path / "two"), "1")
    launch(1, str(model), str(tmp_path / "half"), "1")
    one, one_log = result(tmp_path / "one")
    two, two_log = result(tmp_path / "two")
    half, _ = result(tmp_path / "half")
    for part in ("student", "teacher"):
        for name, expected in one[part].items():
            torch.testing.assert_close(two[part][name], expected, rtol=1e-4, atol=1e-6)
    moved = max((one["student"][n] - half["student"][n]).abs().max() for n in one["student"])
    assert moved > 1e-3, "the control without the second rank's rows ends elsewhere"
    for key in ("loss", "divergence", "entropy", "completion_length", "grad_norm"):
        ours, theirs = ([entry[key] for entry in log] for log in (two_log, one_log))
        assert ours == pytest.approx(theirs, rel=1e-3), key
