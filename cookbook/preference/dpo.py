"""DPO: prefer the chosen answer to the rejected one, held near the model that it was.

python cookbook/preference/dpo.py [--large]
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
        "loss": "dpo",
        "beta": 0.1,
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "warmup_steps": 2,
    }


def main() -> None:
    """Train, and show how often the chosen answer is the likelier one."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for row in job.metrics(as_dataframe=False):
        if "rewards/accuracies" in row:
            print(
                f"step {row['step']}: loss {row['loss']:.3f}, "
                f"chosen preferred {row['rewards/accuracies']:.2f}, "
                f"margin {row['rewards/margins']:.3f}"
            )


if __name__ == "__main__":
    as_command(main)
