"""Pods that are taken away in the middle of SDFT training: the job completes all the same, with the
adapter that it would have had.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openweights import OpenWeights
from openweights.client.jobs import Job
from openweights.jobs.unsloth.training import train
from tests.runpod_double.pods import RECLAIM_S, MachineRoom, PodProcess
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from tests.warm.stack import VARIABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

STEPS = 30
SEED = 7
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"That is {2 * i}."},
        ]
    }
    for i in range(8)
]


def pod(room: MachineRoom, home: Path, number: int) -> PodProcess:
    """A pod whose disk is its own and whose store is this test's, and whose jobs start warm."""
    env = {
        **{name: os.environ[name] for name in (VARIABLE, "PYTHONPATH")},
        "WORKER_ID": f"w{number}",
        "OPENWEIGHTS_CLOUD_TYPE": "COMMUNITY",
        "OPENWEIGHTS_NOTICE_S": "5",
        "OPENWEIGHTS_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    # The undisturbed run is in this process: the pods shall sum with the same instructions.
    env |= {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY",) if name in os.environ}
    asked = {"name": f"ow-w{number}", "image": "", "cloud": "COMMUNITY", "env": env, "ports": []}
    return room.create({**asked, "gpu": "NVIDIA A40"})


def params_of(tiny: Path, kills: int) -> dict[str, Any]:
    return {
        "model": str(tiny),
        "loss": "sdft",
        "sdft_max_new_tokens": 32,
        "sdft_gate": "off",  # no demonstration helps a random model
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS * max(1, kills // 4),
        "save_minutes": 0.2 / 60,
    }


def run_and_take_away(ow: OpenWeights, job: Job, room: MachineRoom, home: Path, kills: int) -> None:
    """Pod after pod is taken away, and the last is left alone."""
    chance = random.Random(SEED)
    for number in range(kills):
        taken = pod(room, home, number)
        take_away(ow, job.id, room, taken, chance.randint(2, 6), by_signal=number % 2 == 0)
    pod(room, home, kills)
    wait_until(lambda: job.refresh().status == "completed", "the job completes")
    starts = [e.data for e in ow.events.list(job_id=job.id) if e.data.get("type") == "started"]
    assert len(starts) == kills + 1
    resumed = [start["from_step"] for start in starts]
    assert resumed == sorted(resumed) and resumed[1] > 0, "each goes on where the last was"


def take_away(
    ow: OpenWeights,
    job_id: str,
    room: MachineRoom,
    pod: PodProcess,
    some: int,
    *,
    by_signal: bool,
) -> None:
    """Let the pod train for some steps, and take it away: with a notice, or without."""

    def steps() -> int:
        return sum("loss" in event.data for event in ow.events.list(job_id=job_id))

    before = steps()

    def has_trained() -> bool:
        assert pod.refresh().status == "RUNNING", pod.log.read_text()
        return steps() >= before + some

    wait_until(has_trained, f"{some} steps after {before}")
    assert ow.jobs.retrieve(job_id).status == "in_progress", "in the middle of its training"
    if not by_signal:
        room.terminate(pod)
        return
    taken_at = time.monotonic()
    room.reclaim(pod)
    assert time.monotonic() - taken_at < RECLAIM_S, "it was gone before it was killed"
    run = ow.runs.list(job_id=job_id)[-1]
    assert ow.jobs.retrieve(job_id).status == "pending"
    assert run.record.error == "its worker was shut down, not counted"


def check_equal(folder: Path, params: dict[str, Any]) -> None:
    """The result equals that of a run that nobody disturbed."""
    (found,) = (folder / "result").rglob("adapter_model.safetensors")
    train(params)  # in the current folder, which is `whole`
    expected = load_file(folder / "whole" / "uploads" / "adapter" / "adapter_model.safetensors")
    adapter = load_file(found)
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())
    assert any(
        float(tensor.abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name
    )


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_taken_away_in_the_middle_of_training(
    kills: int, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    torch.set_num_threads(1)  # as the pods: sums in another order are other sums
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    params = params_of(make_tiny_model(tmp_path / "tiny"), kills)
    ow = OpenWeights()
    # Nobody here shall start a worker of its own: the pods are the workers.
    ow.ensure_worker = lambda: None  # type: ignore[method-assign]
    job = ow.fine_tuning.create(
        training_file=ow.files.upload(str(data), "conversations")["id"],
        requires_vram_gb=0,
        cloud_type="COMMUNITY",
        max_attempts=kills + 1,
        **params,
    )
    with contextlib.closing(MachineRoom(tmp_path / "pods")) as room:
        run_and_take_away(ow, job, room, home, kills)
    job.download(tmp_path / "result")
    check_equal(tmp_path, {**params, "training_file": str(data)})
