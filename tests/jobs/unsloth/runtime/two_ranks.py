"""What each rank of `test_ranks.py` does: a few SDFT steps, whose result rank 0 saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from openweights.jobs.unsloth.runtime.ranks import leave
from tests.jobs.unsloth.test_sdft import EchoEngine, adapters, load, make_trainer, perturb
from tests.jobs.unsloth.test_teacher import averages_of


def main(model_name: str, folder_name: str, batch_size: str) -> None:
    model_folder, folder = Path(model_name), Path(folder_name)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(model_folder)
    trainer = make_trainer(
        model,
        model_folder,
        folder,
        engine=EchoEngine(),
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=2,
        ema_alpha=0.3,
        max_steps=3,
        optim="sgd",
        learning_rate=0.5,
    )
    perturb(model, 1)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(
            {"student": adapters(model), "teacher": averages_of(trainer.teacher)},
            folder / "weights.pt",
        )
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    leave()
