"""Smoke test of SDFT beside SFT: ten steps each on the same rows.

    python cookbook/sdft/test_sdft_vs_sft.py [--large]

Exits with an error unless both have finite losses at every step, both adapters are there, and the
SDFT run has measured its teacher at both ends. Ten steps show that it works, not which of them is
better.
"""

from __future__ import annotations

import math
from typing import Any

from cookbook.models import ORDERS, Choice, as_command, choose
from openweights import OpenWeights

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"loss": "sft"},
    "sdft": {
        "loss": "sdft",
        "sdft_max_new_tokens": 16,
        "sdft_gate": "warn",
    },
}


def params(chosen: Choice, method: str = "sdft") -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        **METHODS[method],
        "max_steps": chosen.steps(STEPS),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 2,
        "job_id_suffix": f"smoke-{method}",
    }


def main() -> None:
    """Train both, then check what they left."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    jobs = {
        method: ow.fine_tuning.create(**params(chosen, method), requires_vram_gb=chosen.vram_gb)
        for method in METHODS
    }
    for method, job in jobs.items():
        job.wait()
        rows = job.metrics(as_dataframe=False)
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == chosen.steps(STEPS) and all(map(math.isfinite, losses)), losses
        events = [event.data for event in job.events()]
        assert any(data.get("path") == "adapter/adapter_config.json" for data in events), method
        measured = [event.data["step"] for event in job.events(type="teacher_gate")]
        assert measured == ([0, len(losses)] if method == "sdft" else []), measured
        print(f"{method}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")


if __name__ == "__main__":
    as_command(main)
