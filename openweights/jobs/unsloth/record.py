"""What one needs to know to train the same thing again."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openweights.jobs.unsloth.model import device_name, resolve_engine
from openweights.jobs.unsloth.validate import TrainingConfig

if TYPE_CHECKING:
    from transformers import Trainer

PACKAGES = (
    "openweights",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "unsloth",
    "bitsandbytes",
)


def reproducibility(config: TrainingConfig, trainer: Trainer) -> dict[str, Any]:
    """Versions, seed, hashes of the data, and where it ran."""
    model: Any = trainer.model
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "device": device_name(),
        "cuda": torch.version.cuda,
        "engine": resolve_engine(config),
        "seed": config.seed,
        "model": config.model,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "base_dtype": str(next(p for p in model.parameters() if not p.requires_grad).dtype),
        "data": {name: _data(config, name) for name in ("training_file", "test_file")},
        "steps": trainer.state.global_step,
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _data(config: TrainingConfig, field: str) -> dict[str, str] | None:
    """The file as named in the config, and the hash of what was read."""
    file = getattr(config, field)
    if file is None:
        return None
    path = Path(file) if Path(file).is_file() else Path("data") / f"{field}.jsonl"
    with path.open("rb") as content:
        return {"file": file, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
