"""Fits recomputation to the GPU's memory after the first step of a training."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback

from openweights.models.recomputation import (
    affordable,
    keep_activations,
    measured,
    recomputing_layers,
)

logger = logging.getLogger(__name__)

# Left free: pieces of memory of many sizes do not fill it without gaps.
_SPARE = 0.12


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
