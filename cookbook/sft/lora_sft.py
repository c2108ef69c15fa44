"""Supervised fine-tuning of a LoRA, with a test set that is evaluated on the way.

python cookbook/sft/lora_sft.py [--large]
"""

from __future__ import annotations

from typing import Any

from cookbook.models import ORDERS, RESULTS, Choice, as_command, choose
from openweights import OpenWeights


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "test_file": str(ORDERS / "test.jsonl"),
        "test_file_eval_strategy": "steps",
        "test_file_eval_steps": chosen.steps(8),
        "loss": "sft",
        "max_steps": chosen.steps(32),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "warmup_steps": 3,
    }


def main() -> None:
    """Train, and say where the adapter is."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for row in job.metrics(as_dataframe=False):
        if "eval_loss" in row:
            print(f"step {row['step']}: test loss {row['eval_loss']:.3f}")
    folder = RESULTS / job.id
    job.download(folder)
    print(f"the adapter is in {folder}/adapter; load it with peft.PeftModel.from_pretrained")


if __name__ == "__main__":
    as_command(main)
