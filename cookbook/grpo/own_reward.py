"""GRPO with a reward function of one's own, beside a built-in one with a weight.

    python cookbook/grpo/own_reward.py [--large]

`brevity.py` is the reward; its text is part of the job, so that another reward is another job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

REWARD = f"{Path(__file__).parent / 'brevity.py'}:score"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "grpo",
        "grpo_reward_function": {REWARD: 1.0, "rouge_l": 0.5},
        "grpo_num_generations": 4,
        "grpo_max_completion_length": 24,
        "grpo_temperature": 1.0,
        "beta": 0.01,
        "max_steps": chosen.steps(24),
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 2,
    }


def main() -> None:
    """Train, and show the reward of each step."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for row in job.metrics(as_dataframe=False):
        if "reward" in row:
            print(f"step {row['step']}: reward {row['reward']:.3f} ± {row['reward_std']:.3f}")


if __name__ == "__main__":
    as_command(main)
