"""Reporting to Weights & Biases and TensorBoard, where a job asks for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openweights.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import TrainerCallback


def check_report_to(names: Sequence[str]) -> None:
    """See that the packages are there, before anything costs time.

    Raises:
        ConfigurationError: One is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"report_to: the package {name} is not installed where the job runs; install it "
                f"there (pip install 'openweights[tracking]'), or remove {name!r}"
            )


def report_callbacks(names: Sequence[str], uploads: Path) -> list[TrainerCallback]:
    """A callback for each; TensorBoard's files go into the results, below `tensorboard/`."""
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(uploads / "tensorboard"))))
    if "wandb" in names:
        from transformers.integrations import WandbCallback

        callbacks.append(WandbCallback())
    return callbacks
