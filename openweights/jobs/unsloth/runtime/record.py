"""What one needs to know to train the same thing again."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from openweights.jobs.unsloth.runtime.ranks import world_size
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.hub_files import split_commit
from openweights.models.load import device_name

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


def reproducibility(config: TrainingConfig, model: Any, engine: str, base: str) -> dict[str, Any]:
    """The environment, the config, the model and hashes of every file that was read.

    Args:
        base: Where the base model was loaded from, with its commit if it has one.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        **environment(),
        "engine": engine,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "model": config.model,
        "model_commit": split_commit(base)[1],
        "base_dtype": str(frozen[0].dtype) if frozen else None,
        "data": {
            ref.name: {"file": ref.file, "sha256": file_hash(ref.local_path)}
            for ref in config.datasets()
        },
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
