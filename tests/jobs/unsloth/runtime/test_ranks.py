"""Two processes train as one does, stop together, and leave one result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S, wait_until
from tests.warm.stack import WarmStack

STEPS = "tests.jobs.unsloth.runtime.two_ranks:main"


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    log = json.loads((folder / "log.json").read_text())
    return torch.load(folder / "weights.pt"), [entry for entry in log if "divergence" in entry]


def test_two_ranks_equal_one_process(stack: WarmStack, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    sgd = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    for number, name, batch_size in ((1, "one", 2), (2, "two", 1), (1, "half", 1)):
        changes = json.dumps({**sgd, "per_device_train_batch_size": batch_size})
        stack.run(number, STEPS, str(model), str(tmp_path / name), changes)
    one, one_log = result(tmp_path / "one")
    two, two_log = result(tmp_path / "two")
    half, _ = result(tmp_path / "half")
    terms = terms_of(AutoModelForCausalLM.from_pretrained(model), 4 * 100, steps=3)
    assert_sums_equal(two, one, terms)
    # The control: without the second rank's rows it ends elsewhere.
    for part in ("student", "teacher"):
        with pytest.raises(AssertionError, match="differs by"):
            assert_sums_equal(half[part], one[part], terms)
    for key in ("loss", "divergence", "entropy", "completion_length", "grad_norm"):
        ours, theirs = ([entry[key] for entry in log] for log in (two_log, one_log))
        assert_sums_equal(ours, theirs, terms, about=key)


class Job:
    """`python -m openweights.jobs.unsloth.training config.json` on two GPUs that are none."""

    def __init__(self, folder: Path, params: dict[str, Any], gpus: int = 2) -> None:
        self.folder = folder
        self._gpus = str(gpus)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(params))

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "openweights.jobs.unsloth.training", "config.json"],
            cwd=self.folder,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "N_GPUS": self._gpus,
                "HF_HUB_OFFLINE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> tuple[int, str]:
        process = self.start()
        output, _ = process.communicate(timeout=HANGS_S)
        return process.returncode, output

    def events(self, name: str) -> list[Any]:
        """Values of that key, in the order of the events."""
        path = self.folder / "uploads" / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event[name] for event in map(json.loads, lines) if name in event]

    def losses(self) -> list[float]:
        return self.events("loss")


@pytest.mark.usefixtures("warm_jobs")
def test_a_job_on_two_gpus_stops_resumes_and_ends_as_one(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"That is {i}."},
            ]
        }
        for i in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = {
        "model": str(make_tiny_model(tmp_path / "model")),
        "training_file": str(data),
        "loss": "sft",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_steps": 8,
    }
    # Samples leave time to be hit by the signal.
    slow = {"dataset": str(data), "eval_steps": 1, "max_tokens": 30, "batch_size": 12}
    job = Job(tmp_path / "job", {**params, "sampling_callbacks": [slow]})
    process = job.start()

    def has_begun() -> bool:
        assert process.poll() is None
        return len(job.losses()) >= 2

    wait_until(has_begun)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode == 143, log
    assert "Traceback" not in log and not (job.folder / "uploads" / "adapter").exists()
    step = len(job.losses())
    assert step < 8
    [checkpoint] = (job.folder / "tmp").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}", "both stopped after that step"
    assert len(list(checkpoint.glob("rng_state_*"))) == 2
    code, log = job.run()
    assert code == 0, log
    assert log.count("step 8/8") == 1 and log.count("done: the adapter is in") == 1
    assert [path.parent.name for path in job.folder.rglob("uploads/*/*.safetensors")] == ["adapter"]
    assert job.events("from_step") == [0, step] and len(job.losses()) == 8, "no event is doubled"
    # One process with the rows of both, which nobody stops; on a CPU, too, whatever is here.
    whole = Job(tmp_path / "whole", {**params, "per_device_train_batch_size": 2}, gpus=1)
    code, log = whole.run()
    assert code == 0, log
    terms = terms_of(AutoModelForCausalLM.from_pretrained(params["model"]), 2 * 60, steps=8)
    assert_sums_equal(job.losses(), whole.losses(), terms)


@pytest.mark.usefixtures("warm_jobs")
def test_what_is_wrong_is_the_last_line_on_two_gpus_too(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "Once"}) + "\n")
    params = {"model": str(tmp_path / "none"), "training_file": str(data), "loss": "sft"}
    code, log = Job(tmp_path / "wrong", params).run()
    assert code == 1 and "ERROR model: there is no folder" in log.splitlines()[-1]
