"""Fits a training into memory: refuses what never can, fits recomputation to the GPU after the
first step, and says what to lower when memory was too small all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from openweights.errors import ConfigurationError
from openweights.jobs.unsloth.config.vram import (
    GPU,
    Device,
    Tokens,
    settings_to_lower,
    vram_needed,
)
from openweights.jobs.unsloth.runtime.recomputation import (
    affordable,
    keep_activations,
    measured,
    recomputing_layers,
)
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import base_dtype, clear_load_errors, device_name
from openweights.models.memory import memory_bytes
from openweights.models.shape import model_shape

logger = logging.getLogger(__name__)

# Left free: pieces of memory of many sizes do not fill it without gaps.
_SPARE = 0.12


def refuse_what_cannot_fit(
    config: TrainingConfig, memory: Callable[[], tuple[int, int]] = memory_bytes, gpus: int = 1
) -> None:
    """Before a model is loaded whose training needs more than there is, whatever the rows are.

    Args:
        config: With the base of its model as `model`.
        gpus: Over which its layers are spread.
        memory: Free and whole memory, in bytes.

    Raises:
        ConfigurationError: With the needed memory.
    """
    shape = model_shape(config.model)
    if shape is None:
        return
    device = GPU
    if not torch.cuda.is_available():
        with clear_load_errors(config.model):
            device = Device(base_dtype(config.model).itemsize, recomputes=False, is_fused=False)
    fewest = Tokens(micro=1, scored=1)
    least = vram_needed(config, shape, device=device, tokens=fewest, gpus=gpus)
    _, whole = memory()
    if least.total > whole:
        raise ConfigurationError(
            f"model: to train {config.model} so takes {least} at least"
            f"{f' on each of {gpus} GPUs' if gpus > 1 else ''}, and {device_name()} has "
            f"{whole / 2**30:.1f} GiB; use a smaller model{_lighter(config)}, or ask for a larger "
            "GPU with requires_vram_gb"
        )


def _lighter(config: TrainingConfig) -> str:
    """What makes the same training take less between its steps."""
    if not config.is_peft:
        return ", or train a LoRA (remove is_peft)"
    return "" if config.load_in_4bit else ", load_in_4bit=True"


@contextmanager
def out_of_memory_explained(config: TrainingConfig) -> Iterator[None]:
    """When the GPU's memory is full inside, the error names the two settings that fill it most.

    Args:
        config: With the base of its model as `model`.

    Raises:
        ConfigurationError: In the place of CUDA's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        shape = model_shape(config.model)
        names = _MOST_OFTEN if shape is None else settings_to_lower(config, shape)
        values = " or ".join(f"{name} (it is {getattr(config, name)})" for name in names)
        needs = "" if shape is None else f", of which the job may need {vram_needed(config, shape)}"
        raise ConfigurationError(
            f"the memory of {device_name()} is full{needs}; lower {values}, or ask for a larger "
            "GPU with requires_vram_gb"
        ) from error


_MOST_OFTEN = ("per_device_train_batch_size", "max_seq_length")


class RecomputationCallback(TrainerCallback):
    """Measures the first step, then lets as many layers keep their activations as fit.

    Does nothing where nothing is recomputed, as on a CPU.

    Args:
        micro_batch_tokens: Of the largest micro-batch that may come.
        budget_gb: Memory that may be used, in GiB; None for that of the GPU.
    """

    def __init__(self, micro_batch_tokens: int, budget_gb: float | None) -> None:
        self._tokens = micro_batch_tokens
        self._budget_gb = budget_gb
        self._layers: list[Any] = []
        self._open = ExitStack()
        self._layer: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch one layer."""
        if not torch.cuda.is_available():
            return
        self._layers = recomputing_layers(kwargs["model"])
        if self._layers:
            self._layer = self._open.enter_context(measured(self._layers[-1]))
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, once."""
        if not self._layers:
            return
        self._open.close()
        layers, self._layers = self._layers, []
        base, tokens = torch.cuda.memory_allocated(), self._layer["tokens"] or 1.0
        step = torch.cuda.max_memory_allocated() - base - self._layer["bytes"]
        count = affordable(
            len(layers), self._layer["bytes"] / tokens, step / tokens, base, self._tokens,
            self._budget(),
        )  # fmt: skip
        keep_activations(layers, count)
        logger.info(
            "memory: %d of %d layers keep their activations (%.1f MiB each for a full micro-batch)",
            count, len(layers), self._layer["bytes"] / tokens * self._tokens / 2**20,
        )  # fmt: skip

    def _budget(self) -> float:
        _, total = torch.cuda.mem_get_info()
        own = total if self._budget_gb is None else min(self._budget_gb * 2**30, total)
        return own * (1 - _SPARE)
