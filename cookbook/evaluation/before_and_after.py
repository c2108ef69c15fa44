"""What training has changed: a model and its fine-tuned self, side by side on held-out rows.

python cookbook/evaluation/before_and_after.py [--large] [--suite humaneval] [--limit 20]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cookbook.models import ORDERS, RESULTS, Choice, as_command, choice, count, parser
from openweights import OpenWeights

EXACT = f"{Path(__file__).parent / 'exact.py'}:exact"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sft",
        "max_steps": chosen.steps(32),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-4,
        "warmup_steps": 3,
    }


def asked(models: Sequence[str], more: Sequence[str] = (), limit: int = 24) -> dict[str, Any]:
    """What `evaluate.create` is told; `more` are evaluations of something else than orders."""
    return {
        "models": list(models),
        "suite": [EXACT, "rouge_l", *more],
        "prompts": str(ORDERS / "test.jsonl"),
        "limit": limit,
    }


def main() -> None:
    """Train, ask both, and print the table."""
    ow = OpenWeights()
    options = parser(__doc__)
    options.add_argument("--suite", action="append", default=[], help="one more evaluation")
    options.add_argument("--limit", type=count, default=24, help="problems of each")
    given = options.parse_args()
    chosen = choice(ow, given)
    training = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    training.wait()
    job = ow.evaluate.create(
        **asked([chosen.model, training.id], given.suite, given.limit),
        max_tokens=40 if not given.suite else None,
        requires_vram_gb=chosen.vram_gb,
    )
    job.wait()
    # Of its last run: one before it may have been lost when it had told some of its scores.
    for event in ow.events.list(run_id=job.runs[-1].id, type="evaluation"):
        score = event.data
        words = f"{score['score']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"
        print(f"{score['task']:<10} {Path(score['model']).name:<30} {words}")
    folder = RESULTS / job.id
    job.download(folder)
    print(f"the table, its figure and all answers are in {folder}/evaluation")


if __name__ == "__main__":
    as_command(main)
