"""Run by torchrun from `test_ranks.py`: a few SDFT steps, whose result rank 0 saves.

two_ranks.py MODEL FOLDER BATCH_PER_RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from openweights.jobs.unsloth.runtime.ranks import leave
from tests.jobs.unsloth.test_sdft import EchoEngine, adapters, load, make_trainer, perturb


def main(model_folder: Path, folder: Path, batch_size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = load(model_folder)
    trainer = make_trainer(
        model,
        model_folder,
        folder,
        engine=EchoEngine(),
        per_device_train_batch_size=batch_size,
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
            {"student": adapters(model), "teacher": trainer.teacher.state()}, folder / "weights.pt"
        )
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
