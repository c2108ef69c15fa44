"""The README's example is run: in short on a random model, and as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import README, ROOT, code
from tests.tiny_model import make_tiny_model


def run_example(source: str, folder: Path, **env: str) -> str:
    """What the README's example prints, run in a folder beside the cookbook's data."""
    (folder / "cookbook").symlink_to(ROOT / "cookbook")
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), **os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "training.png").is_file()
    assert (folder / "result/adapter/adapter_config.json").is_file()
    return done.stdout


@pytest.mark.usefixtures("warm_jobs")
def test_example_runs(home: Path, tmp_path: Path) -> None:
    """As it stands, but for two steps of a random model, which has nothing to teach itself."""
    make_tiny_model(home / "models" / "SmolLM2-135M-Instruct")
    source = code(README, "python")[0]
    short = source.replace("max_steps=32,", 'max_steps=2,\n    sdft_gate="warn",')
    assert short != source
    assert " -> " in run_example(short, tmp_path, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_example_teaches(tmp_path: Path) -> None:
    """As it stands, in an empty home."""
    source = code(README, "python")[0]
    before, _, after = run_example(source, tmp_path).strip().rpartition(" -> ")
    assert after.strip(" .") == "Oslo: 20 red pens" and "Oslo: 20" not in before
