"""ORPO: learn the chosen answer and an odds ratio against the rejected one, without a reference.

python cookbook/preference/orpo.py [--large]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.models import Choice, as_command, choose
from openweights import OpenWeights

PAIRS = Path(__file__).parent / "preferences.jsonl"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(PAIRS),
        "loss": "orpo",
        "beta": 0.1,
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
    }


def main() -> None:
    """Train, and show the loss of each step."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for row in job.metrics(as_dataframe=False):
        if "loss" in row:
            print(f"step {row['step']}: loss {row['loss']:.3f}")


if __name__ == "__main__":
    as_command(main)
