"""Read what the model answers while it trains.

python cookbook/tracking/sampling.py [--large]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cookbook.models import ORDERS, RESULTS, Choice, as_command, choose
from openweights import OpenWeights

ORDINARY = Path(__file__).parent / "data" / "ordinary.jsonl"


def params(chosen: Choice) -> dict[str, Any]:
    """What `fine_tuning.create` is told."""
    return {
        "model": chosen.model,
        "training_file": str(ORDERS / "train.jsonl"),
        "loss": "sft",
        "sampling_callbacks": [
            # "log" is at steps 1 to 10, then 20, 30, …: most changes early.
            {"dataset": str(ORDINARY), "eval_steps": "log", "tag": "ordinary", "max_tokens": 24}
        ],
        "max_steps": chosen.steps(20),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
    }


def main() -> None:
    """Train, and show the first answer of each time."""
    ow = OpenWeights()
    chosen = choose(ow, __doc__)
    job = ow.fine_tuning.create(**params(chosen), requires_vram_gb=chosen.vram_gb)
    job.wait()
    folder = RESULTS / job.id
    job.download(folder)
    for path in sorted((folder / "samples").glob("*.jsonl"), key=step_of):
        first = json.loads(path.read_text().splitlines()[0])
        print(f"{path.stem}: {first['completion']!r}")


def step_of(path: Path) -> int:
    """The step at which a file was sampled, the end of its name."""
    return int(path.stem.rpartition("-")[2])


if __name__ == "__main__":
    as_command(main)
