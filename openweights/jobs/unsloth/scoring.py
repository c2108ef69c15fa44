"""Scoring completions: which hidden states count, with what weight, through which head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openweights.jobs.unsloth.divergence import Head
from openweights.jobs.unsloth.rollout import evaluating
from openweights.jobs.unsloth.sdft_data import SDFTExample

logger = logging.getLogger(__name__)


def teacher_gate(model: nn.Module, examples: Sequence[SDFTExample]) -> dict[str, Any]:
    """How much the demonstration in its prompt helps the model; SDFT can teach no more than that.

    Returns:
        An event with the mean log-probability per token of the demonstrations, given the prompt
        alone (`logp_without`) and given the teacher's prompt (`logp_with`), over `rows` rows.
    """
    base = base_model(model)
    device = next(model.parameters()).device
    means = {}
    for name, prompts in (
        ("logp_without", [e.prompt_ids for e in examples]),
        ("logp_with", [e.teacher_prompt_ids for e in examples]),
    ):
        total, count = 0.0, 0
        for prompt, example in zip(prompts, examples, strict=True):
            ids = torch.tensor([prompt + example.demonstration_ids], device=device)
            with evaluating(model):
                logits = base(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            targets = ids[0, len(prompt) :, None]
            total += float(logits.float().log_softmax(-1).gather(-1, targets).sum())
            count += len(targets)
        means[name] = total / count
    logger.info(
        "teacher gate: demonstrations have log-prob %.3f per token given the prompt, %.3f with "
        "the demonstration in it",
        means["logp_without"], means["logp_with"],
    )  # fmt: skip
    return {"type": "teacher_gate", "step": 0, "rows": len(examples), **means}


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
