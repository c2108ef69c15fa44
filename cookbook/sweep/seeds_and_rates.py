"""A sweep over learning rates and seeds: submit, find again by `meta`, and compare.

    python cookbook/sweep/seeds_and_rates.py [--large]

The jobs' ids follow from their parameters, so that a second call adds only what is missing. The
grid is queued at once; one worker takes the jobs one by one, several take them side by side.
"""

from __future__ import annotations

import itertools
from statistics import mean, stdev
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

SWEEP = "ledger-lines"
RATES = (5e-5, 2e-4)
SEEDS = (1, 2)


def params(chosen: Choice, rate: float = RATES[0], seed: int = SEEDS[0]) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "test_file": str(ORDERS / "test.jsonl"),
        "loss": "sft",
        "max_steps": chosen.steps(12),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": rate,
        "seed": seed,
        "meta": {"sweep": SWEEP, "rate": rate, "seed": seed},
    }


def main() -> None:
    """Run the grid, and show mean and spread over the seeds for each learning rate."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    for rate, seed in itertools.product(RATES, SEEDS):
        ow.fine_tuning.create(**params(chosen, rate, seed), requires_vram_gb=chosen.vram_gb)
    for rate in RATES:
        jobs = ow.jobs.find(model=chosen.model, meta={"sweep": SWEEP, "rate": rate})
        losses = [last_test_loss(job.wait()) for job in jobs]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        print(f"rate {rate:g}: test loss {mean(losses):.3f} ± {spread:.3f}, {len(losses)} seeds")


def last_test_loss(job: Any) -> float:
    """The test loss after training."""
    rows = job.metrics(as_dataframe=False)
    return [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


if __name__ == "__main__":
    as_command(main)
