"""What one needs to know to train the same thing again."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from openweights.jobs.unsloth.runtime.ranks import world_size
from openweights.jobs.unsloth.runtime.reporting import local_copy
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import device_name, resolve_engine

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
    "vllm",
)


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "device": device_name(),
        "devices": world_size(),
        "cuda": torch.version.cuda,
    }


def reproducibility(config: TrainingConfig, model: Any) -> dict[str, Any]:
    """The environment, the config, the model and hashes of every file that was read."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        **environment(),
        "engine": resolve_engine(config),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "model": config.model,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "base_dtype": str(frozen[0].dtype) if frozen else None,
        "data": {
            field: {"file": file, "sha256": file_hash(local_copy(field, file))}
            for field, (file, _) in config.dataset_files().items()
        },
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
