"""Smoke test of GRPO: ten steps with two rewards that need no judge.

    python cookbook/sdft/test_grpo_smoke.py [--large]

Exits with an error unless every step has a finite loss and reward, no reward failed, and the
adapter is there.
"""

from __future__ import annotations

import math
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

STEPS = 10


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "grpo",
        # The second differs between the answers of any model, so that there is something to learn.
        "grpo_reward_function": {"rouge_l": 1.0, "caps_spanish": 0.1},
        "grpo_num_generations": 4,
        "grpo_max_completion_length": 16,
        "beta": 0.0,
        "max_steps": chosen.steps(STEPS),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
    }


def main() -> None:
    """Train, then check what is left."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    rows = [row for row in job.metrics(as_dataframe=False) if "reward" in row]
    assert len(rows) == chosen.steps(STEPS), rows
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["reward"]) for row in rows), rows
    assert not any(row["failed_fraction"] for row in rows), rows
    assert any(e.data.get("path") == "adapter/adapter_config.json" for e in job.events())
    print(f"reward {rows[0]['reward']:.3f} to {rows[-1]['reward']:.3f} in {len(rows)} steps")


if __name__ == "__main__":
    as_command(main)
