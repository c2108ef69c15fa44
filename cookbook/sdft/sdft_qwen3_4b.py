"""SDFT as one would run it on a model that learns in context: Qwen3-4B with `--large`.

    python cookbook/sdft/sdft_qwen3_4b.py [--large]

Before it trains, the job asks the model some of the prompts, without the demonstration and with it
in its last user turn, as in the paper, or as earlier turns of the conversation, which small models
need; it takes what serves best, and stops where nothing does (the teacher gate).
"""

from __future__ import annotations

from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sdft",
        "sdft_divergence": "forward_kl",
        "sdft_gate": "stop" if chosen.is_large else "warn",
        "sdft_max_new_tokens": 32,
        "max_steps": chosen.steps(24),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2 if chosen.is_large else 1,
        "learning_rate": 1e-4 if chosen.is_large else 3e-4,
        "warmup_steps": 3,
    }


def main() -> None:
    """Train, and show the teacher gate and how student and teacher come to agree."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for event in job.events(type="teacher_gate"):
        print({name: value for name, value in event.data.items() if name != "type"})
    for row in job.metrics(as_dataframe=False):
        if "agreement" in row:
            print(f"step {row['step']}: loss {row['loss']:.3f}, agreement {row['agreement']:.2f}")


if __name__ == "__main__":
    as_command(main)
