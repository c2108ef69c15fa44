"""Scoring completions: which hidden states count, with what weight, through which head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openweights.jobs.unsloth.divergence import Head


def token_weights(loss_mask: Tensor, sequences: int) -> Tensor:
    """Weight of each scored token: 1 / (tokens of its sequence * `sequences`).

    Packed in row order, shape (N,).
    """
    per_row = loss_mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return (1.0 / (per_row * sequences)).expand_as(loss_mask)[loss_mask]


def scored_hidden(base: Any, inputs: dict[str, Tensor], prefix: str) -> Tensor:
    """Last hidden states at the scored positions, packed in row order; shape (N, H)."""
    hidden = base.get_decoder()(
        input_ids=inputs[f"{prefix}input_ids"],
        attention_mask=inputs[f"{prefix}attention_mask"],
        use_cache=False,
    ).last_hidden_state  # (B, T, H)
    return hidden[inputs[f"{prefix}loss_mask"]]


def frozen_head(base: Any) -> Head | None:
    """The output head; None when it is trained, so that student and teacher differ in it."""
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or any(p.requires_grad for p in module.parameters()):
        return None
    return Head(module.weight, module.bias, *_logit_transform(base))


def output_logits(base: Any, hidden: Tensor) -> Tensor:
    """Logits of shape (N, V) in float32 through the model's own head, adapters included."""
    scale, softcap = _logit_transform(base)
    logits = base.get_output_embeddings()(hidden).float() * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _logit_transform(base: Any) -> tuple[float, float | None]:
    """Factor and soft cap that the architecture applies to its logits; (1, None) for most."""
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)


def base_model(model: nn.Module) -> Any:
    """The causal language model itself; inside a `PeftModel` its layers hold the adapters."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
