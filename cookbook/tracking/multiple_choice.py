"""Ask questions with several answers while the model trains; then put them to it once more.

python cookbook/tracking/multiple_choice.py [--large]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sft",
        "mcq_callbacks": [
            {"dataset": str(QUESTIONS), "eval_steps": chosen.steps(5), "tag": "general"}
        ],
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
    }


def main() -> None:
    """Train, show the accuracy over the steps, and ask again with `ow.multiple_choice`."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for event in job.events(type="multiple_choice"):
        step, right, likely = (event.data[key] for key in ("step", "accuracy", "probability"))
        print(f"step {step:3}  accuracy {right:.2f}  right answer's share {likely:.3f}")
    asking = ow.multiple_choice.create(
        model=job.id, dataset=str(QUESTIONS), requires_vram_gb=chosen.vram_gb
    )
    asking.wait()
    print("once more, by a job:", ow.events.latest(["accuracy"], job_id=asking.id))


if __name__ == "__main__":
    as_command(main)
