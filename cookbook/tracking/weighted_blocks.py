"""SFT in which parts of an answer have weights: learnt more, less, not at all, or unlearnt.

    python cookbook/tracking/weighted_blocks.py [--large]

In `data/weighted.jsonl` the fact of each answer weighs 1, the polite opening 0.2, and an empty
phrase at the end -0.1, which is made less likely. Each block has a tag, by which its
log-probabilities are followed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from cookbook.models import Choice, as_command, choose
from openweights import OpenWeights

BLOCKS = Path(__file__).parent / "data" / "weighted.jsonl"


def params(chosen: Choice) -> dict[str, Any]:
    """What `weighted_sft.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(BLOCKS),
        "logp_callback_datasets": {"blocks": str(BLOCKS)},
        "eval_every_n_steps": chosen.steps(5),
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
    }


def main() -> None:
    """Train, and show the mean log-probability of each tag's tokens over the steps."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.weighted_sft.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in job.events(type="logprob_block"):
        found[event.data["step"], event.data["tag"]] += event.data["logprobs"]
    for (step, tag), values in sorted(found.items()):
        print(f"step {step:3}  {tag}: {sum(values) / len(values):.3f} nats a token")


if __name__ == "__main__":
    as_command(main)
