"""What each rank of `test_step_mean_ranks.py` does: weighted SFT, then DPO; rank 0 saves logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.runtime.ranks import join, leave
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.load import load_model
from tests.jobs.unsloth.malformed_configs import DPO, GOOD
from tests.jobs.unsloth.test_preference import ROWS as PAIRS
from tests.jobs.unsloth.test_weights import ROWS as WEIGHTED


def main(model_folder: str, folder_name: str, batch_size: str, layers: str = "whole") -> None:
    """Train with the layers "whole" on each rank, or "spread" over them."""
    folder = Path(folder_name)
    folder.mkdir(exist_ok=True)
    options = {
        "model": model_folder,
        "max_steps": 3,
        "per_device_train_batch_size": int(batch_size),
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.2,
        "optim": "sgd",
        "warmup_steps": 0,
        "packing": False,
    }
    logs: dict[str, Any] = {}
    if layers == "spread":
        join()
    for name, good, rows in (("sft", GOOD, WEIGHTED[:4]), ("dpo", DPO, PAIRS[:4])):
        own = {key: value for key, value in options.items() if name == "sft" or key != "packing"}
        config = training_config({**good, **own, "output_dir": str(folder / name)})
        model, tokenizer = load_model(config, spread=layers == "spread")
        run = sft_train if name == "sft" else preference_train
        trainer = run(config, model, tokenizer, rows, None)
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(logs))
    leave()
