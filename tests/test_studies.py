"""docs/studies.md is run: its reward, its grid and its kind of job, on a random model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openweights import OpenWeights
from openweights.client.watching.progress import read_progress
from openweights.dashboard.samples import answer_rows, answer_steps
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions, own_reward
from openweights.jobs.unsloth.rewards import Samples
from tests.test_readme import ROOT, code
from tests.tiny_model import make_tiny_model
from tests.warm.stack import PATHS

PAGE = (ROOT / "docs/studies.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the page's files in it, and the cookbook's data beside them."""
    for source in code(PAGE, "python"):
        name = re.match(r"# (\w+\.py)\n", source)
        assert name, source
        (tmp_path / name[1]).write_text(source, encoding="utf-8")
    (tmp_path / "cookbook").symlink_to(ROOT / "cookbook")
    return tmp_path


def run(folder: Path, name: str) -> str:
    """What a file of the page prints."""
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder,
        env={
            "PYTHONPATH": os.pathsep.join(PATHS),
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_reward(folder: Path) -> None:
    """By itself, and as GRPO and the gate call it; its file is accepted by both."""
    assert run(folder, "ledger.py") == "[1.0, 0.5, 0.0]\n"
    golds = ["Oslo: 20 red pens.", "Something else"]
    samples = Samples([[], []], [golds[0], "x"], [[1], [2]], [{"gold_response": g} for g in golds])
    reward = own_reward(folder / "ledger.py", "score", 1.0)
    ((right, unknown),) = RewardFunctions([reward], limit_s=5).score(samples)
    assert right == 1.0 and unknown != unknown, "None is no number, and not 0"
    named = f"{folder / 'ledger.py'}:score"
    file = str(folder / "cookbook/sdft/data/train.jsonl")
    common = {"model": "org/model", "training_file": file}
    ow = OpenWeights()
    for own in (
        {"loss": "grpo", "grpo_reward_function": named, "per_device_train_batch_size": 8},
        {"loss": "sdft", "sdft_gate_reward": named},
    ):
        ow.fine_tuning.check(ow.fine_tuning.validate({**common, **own}))
    ow.close()


WHOLE = "(1e-4, 3e-4), (1, 2)"


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize(
    ("grid", "count"), [("(3e-4,), (1,)", 1), pytest.param(WHOLE, 4, marks=pytest.mark.slow)]
)
def test_the_grid(folder: Path, home: Path, grid: str, count: int) -> None:
    """As it stands, but for two steps of a random model."""
    pytest.importorskip("pandas")
    make_tiny_model(home / "models" / "SmolLM2-135M-Instruct")
    source = (folder / "grid.py").read_text()
    assert WHOLE in source and '"max_steps": 16' in source
    short = source.replace('"max_steps": 16', '"max_steps": 2').replace(WHOLE, grid)
    (folder / "grid.py").write_text(short)
    printed = run(folder, "grid.py")
    ow = OpenWeights()
    jobs = ow.jobs.find(meta={"study": "ledger"})
    assert len(jobs) == 2 * count and {job.status for job in jobs} == {"completed"}
    second = [job for job in jobs if job.after]
    assert len(second) == count and all(job.id in printed for job in second)
    assert "mean_token_accuracy" in printed and "..." not in printed
    assert (folder / "grid.png").stat().st_size > 1000
    if count > 1:
        means = ow.compare(second).groupby("params.learning_rate").loss.mean()
        assert list(means.index) == [1e-4, 3e-4]
    ow.close()


def test_the_kind_of_job(folder: Path) -> None:
    """What it logs is where the page's table says."""
    rows = eval(run(folder, "stats.py"))  # noqa: S307 - what our own page prints
    assert [row["mean_length"] for row in rows] == pytest.approx([3.0, 22 / 3])
    assert (folder / "result/longest.txt").read_text() == "coincidence\n"
    ow = OpenWeights()
    (job,) = ow.jobs.list()
    progress = read_progress(ow.backend, job.record)
    assert (progress.step, progress.total) == (2, 2)
    last = answer_steps(ow.backend, job.id)[-1]
    assert (last["step"], last["source"]) == (2, "training prompts")
    (said,) = answer_rows(ow.backend, job.id, last["event"])
    assert said["completion"] == "coincidence" and said["rewards"] == {"length": 11}
    logged = re.findall(r"^\| `(\{.*?\})` \|", PAGE, re.M)
    assert len(logged) == 5 and all(isinstance(json.loads(_filled(one)), dict) for one in logged)
    ow.close()


def _filled(line: str) -> str:
    return line.replace('"…"', '"x"').replace("{…}", "{}").replace("…", '"x"')
