"""A model is asked while it trains: its deployment follows the job, checkpoint by checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights import OpenWeights
from openweights.client.jobs import Job
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "Hello"}]
# A step of the training ends when the test lets it: its reward waits for a file.
REWARD = """
import time
from pathlib import Path

steps = 0


def score(completions):
    global steps
    steps += 1
    deadline = time.monotonic() + 240
    while not Path({folder!r}, f"go-{{steps}}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return [len(set(completion)) for completion in completions]
"""


def gated_training(ow: OpenWeights, folder: Path) -> tuple[Job, Callable[[int], None]]:
    """A job of three steps, each of which is let go by its number."""
    rows = [{"messages": [{"role": "user", "content": f"What is {n}?"}]} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD.format(folder=str(folder)))
    job = ow.fine_tuning.create(
        model=str(make_tiny_model(folder / "tiny")),
        training_file=str(folder / "rows.jsonl"),
        loss="grpo",
        grpo_reward_function=f"{folder / 'reward.py'}:score",
        grpo_num_generations=4,
        grpo_max_completion_length=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=5e-2,
        warmup_steps=0,
        max_steps=3,
        save_steps=1,
        max_seq_length=128,
        requires_vram_gb=0,
    )

    def let_go(step: int) -> None:
        (folder / f"go-{step}").touch()

    return job, let_go


@pytest.mark.slow
def test_the_newest_checkpoint_is_served_while_the_job_trains(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ow = OpenWeights()
    job, let_go = gated_training(ow, tmp_path)
    let_go(1)
    wait_until(lambda: job.events(type="checkpoint"))
    api = ow.api.deploy(job.id, requires_vram_gb=0)
    with api as client:
        server = ow.jobs.retrieve(api.job_id)

        def told() -> list[float]:
            answer = client.chat.completions.create(
                model=job.id, messages=HELLO, max_tokens=3, temperature=0, logprobs=True
            )
            values = answer.choices[0].logprobs
            assert values is not None and values.content
            return [token.logprob for token in values.content]

        def is_served(name: str) -> bool:
            return f"{job.id} is served from {name}" in server.logs()

        assert job.id in api.models
        wait_until(lambda: is_served(f"{job.id}/checkpoint-1"))  # its log comes in pieces
        first = told()
        assert told() == first and job.refresh().status == "in_progress", "both run at a time"
        let_go(2)
        wait_until(lambda: is_served(f"{job.id}/checkpoint-2"))
        second = told()
        assert second != first and job.refresh().status == "in_progress"
        let_go(3)
        wait_until(lambda: job.refresh().status == "completed")
        wait_until(lambda: is_served(f"{job.id}\n") or server.logs().endswith(job.id))
        assert told() != second
        base = client.chat.completions.create(model=str(job.model), messages=HELLO, max_tokens=3)
        assert base.choices, "the base is served beside it"
    ow.close()
