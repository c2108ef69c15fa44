"""Teaches SmolLM2-135M-Instruct one skill from demonstrations by self-distillation.

    python cookbook/sdft/sdft_smollm2.py [--large]

On two idle cores it takes three to four minutes. `ow demo` compares this with SFT on the same rows.
"""

from __future__ import annotations

from typing import Any

from cookbook.models import ORDERS, RESULTS, Choice, as_command, choose
from openweights import OpenWeights
from openweights.types import EventRecord


def params(chosen: Choice, gate: str = "stop") -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sdft",
        "sdft_divergence": "forward_kl",
        "sdft_max_new_tokens": 16,
        "sdft_gate": gate,
        "max_steps": chosen.steps(32),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-4,
    }


def tell(event: EventRecord) -> None:
    """Where student and teacher agree."""
    if "agreement" in event.data and "type" not in event.data:
        step, loss, share = (event.data[name] for name in ("step", "loss", "agreement"))
        print(f"step {step}: divergence {loss:.3f}, agreement {share:.2f}", flush=True)


def main() -> None:
    """Train, draw what was measured, and ask the model."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    # A model whose teacher is no better than its student is stopped; another one is only told so.
    gate = "warn" if chosen.is_other else "stop"
    job = ow.fine_tuning.create(**params(chosen, gate), requires_vram_gb=chosen.vram_gb)
    job.wait(on_event=tell)
    folder = RESULTS / job.id
    job.download(folder)
    job.plot(folder / "training.png")
    for row in job.sample(["Summarise this order: Send 20 red pens to Oslo."], max_tokens=20):
        print(f"{row['base']!r} -> {row['answer']!r}")
    print(f"the adapter is in {folder}/adapter; load it with peft.PeftModel.from_pretrained")


if __name__ == "__main__":
    as_command(main)
