"""SDFT steps of one process or of each of two ranks, whose result rank 0 saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from openweights.jobs.unsloth.runtime.ranks import join, leave
from openweights.models.sharding import spread_layers
from tests.jobs.unsloth.test_sdft import EchoEngine, adapters, load, make_trainer, perturb
from tests.jobs.unsloth.test_teacher import averages_of


def main(
    model_name: str, folder_name: str, changes: str, layers: str = "whole", resume_from: str = ""
) -> None:
    """Train.

    Args:
        changes: Of the config, as JSON.
        layers: "whole", or "spread" over the ranks.
        resume_from: Folder of a checkpoint.
    """
    model_folder, folder = Path(model_name), Path(folder_name)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(model_folder)
    if layers == "spread":
        join()
        spread_layers(model, torch.device("cpu"))
    trainer = make_trainer(
        model, model_folder, folder, engine=EchoEngine(), ema_alpha=0.3, **json.loads(changes)
    )
    perturb(model, 1)
    trainer.train(resume_from_checkpoint=resume_from or None)
    if trainer.is_world_process_zero():
        weights = {"student": adapters(model), "teacher": averages_of(trainer.teacher)}
        torch.save(weights, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    leave()
