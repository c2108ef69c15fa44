"""Fits a training into memory: refuses what never can, fits recomputation to the GPU and to each
micro-batch after the first step, and says what to lower when memory was too small all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

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
from openweights.models.forward import base_model, decoder_of
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


class Meter(Protocol):
    """Counts the memory of the device that trains, in bytes."""

    def allocated(self) -> int:
        """What tensors take at this moment."""
        ...

    def peak(self) -> int:
        """The most that they took since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        ...

    def available(self) -> int:
        """What this process has and may still get."""
        ...


class CudaMeter:
    """The memory of this process's GPU."""

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()


class RecomputationCallback(TrainerCallback):
    """Measures the first step; then as many layers keep their activations as fit beside the tokens
    of each micro-batch.

    Does nothing where nothing is recomputed, as on a CPU. What rollouts and the teacher take does
    not count: it is gone when activations are there.

    Args:
        budget_gb: Memory that may be used, in GiB; None for what the GPU has left.
        meter: None for the GPU's, where there is one.
    """

    def __init__(self, budget_gb: float | None, meter: Meter | None = None) -> None:
        self.budget_gb = budget_gb
        self._meter = meter or (CudaMeter() if torch.cuda.is_available() else None)
        self._layers: list[Any] = []
        self._open = ExitStack()
        self._layer: dict[str, float] = {}
        self._peak = 0
        self._fits: Callable[[int], int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch one layer."""
        if self._meter is None:
            return
        self._layers = recomputing_layers(kwargs["model"])
        if self._layers:
            self._layer = self._open.enter_context(measured(self._layers[-1]))
            decoder = decoder_of(base_model(kwargs["model"]))
            decoder.register_forward_pre_hook(self._before_a_pass, with_kwargs=True)

    def _before_a_pass(self, decoder: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Decide for the tokens that come, or find out what a pass takes."""
        if not torch.is_grad_enabled():  # a teacher's pass, or a rollout's
            return
        if self._fits is None:
            self._note_peak()
            return
        ids = given.get("input_ids")
        shape = (given["inputs_embeds"] if ids is None else ids).shape
        keep_activations(self._layers, self._fits(shape[0] * shape[1]))

    def _note_peak(self) -> None:
        assert self._meter is not None
        if self._layer["tokens"]:  # before the first pass there were rollouts alone
            self._peak = max(self._peak, self._meter.peak())
        self._meter.reset_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the measure, once."""
        if not self._layers or self._fits is not None or self._meter is None:
            return
        self._open.close()
        self._note_peak()
        base, tokens = self._meter.allocated(), self._layer["tokens"] or 1.0
        layer, step = self._layer["bytes"], self._peak - base - self._layer["bytes"]
        budget = self._budget(self._meter)

        def fits(wanted: int) -> int:
            # Some of what a step takes, such as a chunk of logits, is not less for fewer tokens.
            peak = step / min(tokens, wanted)
            return affordable(len(self._layers), layer / tokens, peak, base, wanted, budget)

        self._fits = fits
        logger.info(
            "memory: %d of %d layers keep their activations in a micro-batch of %d tokens "
            "(%.1f MiB each)",
            fits(int(tokens)), len(self._layers), tokens, layer / 2**20,
        )  # fmt: skip

    def _budget(self, meter: Meter) -> float:
        own = meter.available()
        if self.budget_gb is not None:
            own = min(self.budget_gb * 2**30, own)
        return own * (1 - _SPARE)
