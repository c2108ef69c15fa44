"""Run by torchrun from `test_step_mean_ranks.py`: weighted SFT and DPO, whose losses rank 0 saves.

two_ranks_step_mean.py MODEL FOLDER BATCH_PER_RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from openweights.jobs.unsloth.preference import preference_train
from openweights.jobs.unsloth.runtime.ranks import leave
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.load import load_model
from tests.jobs.unsloth.malformed_configs import DPO, GOOD
from tests.jobs.unsloth.test_preference import ROWS as PAIRS
from tests.jobs.unsloth.test_weights import ROWS as WEIGHTED


def main(model_folder: str, folder: Path, batch_size: int) -> dict[str, Any]:
    """The log of each training, without what time it took."""
    options = {
        "model": model_folder,
        "max_steps": 3,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.2,
        "optim": "sgd",
        "warmup_steps": 0,
        "packing": False,
    }
    logs: dict[str, Any] = {}
    for name, good, rows in (("sft", GOOD, WEIGHTED[:4]), ("dpo", DPO, PAIRS[:4])):
        own = {key: value for key, value in options.items() if name == "sft" or key != "packing"}
        config = training_config({**good, **own, "output_dir": str(folder / name)})
        model, tokenizer = load_model(config)
        run = sft_train if name == "sft" else preference_train
        trainer = run(config, model, tokenizer, rows, None)
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(logs))
    leave()
    return logs


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
