"""Follow how likely a set of answers is while something else is trained; then score them once more.

    python cookbook/tracking/log_probabilities.py [--large]

The model learns ledger lines from orders. On the way, and by a job of its own afterwards, it is
measured how likely a few ordinary answers remain: what training moves elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

ORDINARY = Path(__file__).parent / "data" / "ordinary.jsonl"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sft",
        "logp_callback_datasets": {"ordinary": str(ORDINARY), "orders": str(ORDERS / "test.jsonl")},
        "eval_every_n_steps": chosen.steps(5),
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
    }


def main() -> None:
    """Train, show both losses over the steps, and score the trained model with `ow.logprob`."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    for event in job.events(type="logprobs"):
        name = event.data["tag"]
        print(f"step {event.data['step']:3}  {name}: loss {event.data[name]:.3f}")
    scoring = ow.logprob.create(
        model=job.id, dataset=str(ORDINARY), requires_vram_gb=chosen.vram_gb
    )
    scoring.wait()
    print("once more, by a job:", ow.events.latest(["loss"], job_id=scoring.id))


if __name__ == "__main__":
    as_command(main)
