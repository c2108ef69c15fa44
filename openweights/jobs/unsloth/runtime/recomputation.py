"""How many layers recompute their activations in the backward pass: as few as memory allows.

Recomputation (gradient checkpointing, Chen et al., arXiv 1604.06174) of a layer costs a second
forward pass through it. Doing so in every layer wastes up to a quarter of a step where memory is
left over. What a layer would keep instead is measured on a real micro-batch; it is proportional to
its tokens, so that a short micro-batch may keep more layers than a full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputing_layers(model: nn.Module) -> list[Any]:
    """The layers that recompute their activations now, first to last."""
    layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


def keep_activations(layers: list[Any], count: int) -> None:
    """Let the last `count` of the layers keep them: theirs are freed first in the backward pass."""
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < len(layers) - count


def affordable(
    layers: int, layer_bytes_per_token: float, peak_bytes_per_token: float, base_bytes: float,
    tokens: int, budget_bytes: float,
) -> int:  # fmt: skip
    """How many of the layers can keep their activations within the budget.

    Args:
        layer_bytes_per_token: What one layer keeps.
        peak_bytes_per_token: What a step with recomputation everywhere takes beside `base_bytes`.
        base_bytes: Weights, optimizer states, and what else is there between steps.
        tokens: Of the largest micro-batch that may come.
    """
    free = budget_bytes - base_bytes - peak_bytes_per_token * tokens
    return max(0, min(layers, int(free // max(layer_bytes_per_token * tokens, 1.0))))


@contextmanager
def measured(layer: Any) -> Iterator[dict[str, float]]:
    """Inside, the layer keeps its activations, and what they take is found out.

    Yields:
        `bytes` and `tokens` of its largest forward pass. Parameters do not count, and a piece of
        memory counts once.
    """
    found: dict[str, float] = {"bytes": 0.0, "tokens": 0.0}
    forward = layer.forward

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # a teacher's pass, or a rollout's
            return forward(hidden, *args, **kwargs)
        tokens = float(hidden.shape[0] * hidden.shape[1])
        if tokens < found["tokens"]:
            return forward(hidden, *args, **kwargs)
        # Here, where they are, also those of a layer that is gathered for the pass.
        seen = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        found.update(bytes=0.0, tokens=tokens)

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found["bytes"] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return forward(hidden, *args, **kwargs)

    layer.gradient_checkpointing = False
    layer.forward = counted
    try:
        yield found
    finally:
        del layer.forward
        layer.gradient_checkpointing = True
