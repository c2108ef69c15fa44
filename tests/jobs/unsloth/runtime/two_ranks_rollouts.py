"""What each rank of `test_even_shares.py` does: SDFT and GRPO with completions that are drawn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from openweights.jobs.unsloth.grpo_ft import grpo_train
from openweights.jobs.unsloth.runtime.ranks import leave
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.validate import training_config
from openweights.models.forward import base_model
from openweights.models.load import load_model
from tests.jobs.unsloth.malformed_configs import GRPO, SDFT

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "count to " + "x" * (1 + 7 * i % 40)},
            {"role": "assistant", "content": "one two " + "y" * i},
        ]
    }
    for i in range(16)
]
REWARD = "def score(completions):\n    return [len(set(text)) for text in completions]\n"
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "max_seq_length": 400,
    "learning_rate": 0.1,
    "optim": "sgd",
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}
ENDS = list(range(3, 320, 12))  # so that a completion has about twelve tokens


def main(model_folder: str, folder_name: str, batch_size: str) -> None:
    folder = Path(folder_name)
    folder.mkdir(exist_ok=True)
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    losses: dict[str, tuple[Any, dict[str, Any]]] = {
        "sdft": (sdft_train, {**SDFT, "sdft_max_new_tokens": 40, "sdft_gate": "off"}),
        "grpo": (
            partial(grpo_train, fetch=lambda name, _: Path(name)),
            {
                **GRPO,
                "grpo_reward_function": f"{reward}:score",
                "grpo_num_generations": 4,
                "grpo_max_completion_length": 40,
            },
        ),
    }
    told: dict[str, Any] = {}
    for name, (train, own) in losses.items():
        size = {"per_device_train_batch_size": int(batch_size)}
        options = {"model": model_folder, "output_dir": str(folder / name)}
        config = training_config({**own, **OPTIONS, **size, **options})
        model, tokenizer = load_model(config)
        base_model(model).generation_config.eos_token_id = ENDS
        events: list[dict[str, Any]] = []
        trainer = train(config, model, tokenizer, ROWS, None, log_event=events.append)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        told[name] = {"log": log, "events": events}
    if trainer.is_world_process_zero():
        (folder / "told.json").write_text(json.dumps(told))
    leave()
