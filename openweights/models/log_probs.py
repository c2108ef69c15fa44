"""Log-probabilities of tokens, equal to those of a plain forward.

Only the positions that are scored go through the output head, some at a time, so that logits over
the vocabulary are never held for a whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openweights.models.forward import base_model, evaluating, output_logits
from openweights.models.tokens import IGNORED, Collator

CHUNK_TOKENS = 1024  # so many rows of logits are there at a time


def scored_log_probs(base: Any, batch: Mapping[str, Tensor], scored: Tensor) -> Tensor:
    """Log-probability of each scored token given those before it, in float32.

    Args:
        base: The causal language model itself (`scoring.base_model`).
        batch: `input_ids` of shape (B, T), with `attention_mask` or `position_ids`.
        scored: Which tokens, shape (B, T); the first of a row is never one.

    Returns:
        Packed in row order, shape (N,); with gradients where they are wanted.
    """
    given = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    hidden = base.get_decoder()(
        input_ids=batch["input_ids"], use_cache=False, **given
    ).last_hidden_state  # (B, T, H)
    wanted = scored[:, 1:]
    hidden, targets = hidden[:, :-1][wanted], batch["input_ids"][:, 1:][wanted]
    parts = [
        # The logits of a chunk are made again in the backward pass instead of being kept.
        checkpoint(_log_probs, base, rows, tokens, use_reentrant=False)
        if rows.requires_grad
        else _log_probs(base, rows, tokens)
        for rows, tokens in zip(
            hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        )
    ]
    return torch.cat(parts)


def _log_probs(base: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = output_logits(base, hidden)  # (N, V)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def answer_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels of each row, and how many there are; both of shape (B,)."""
    scored = batch["labels"] != IGNORED
    values = scored_log_probs(base_model(model), batch, scored)
    rows = scored[:, 1:].nonzero()[:, 0]
    return values.new_zeros(len(scored)).index_add(0, rows, values), scored.sum(-1)


def mean_target_log_probs(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int,
    *,
    batch_size: int,
) -> list[float]:
    """Mean log-probability per token, in nats, of each target after its context.

    Args:
        pairs: Context and target, in token ids; neither is empty.
    """
    collate, device = Collator(pad_token_id), next(model.parameters()).device
    rows = [
        {"input_ids": [*context, *target], "labels": [*[IGNORED] * len(context), *target]}
        for context, target in pairs
    ]
    means: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        with evaluating(model):
            sums, counts = answer_log_probs(model, {n: v.to(device) for n, v in batch.items()})
        means += (sums.double() / counts).tolist()
    return means


def all_log_probs(
    model: nn.Module, rows: Sequence[Sequence[int]], pad_token_id: int, *, batch_size: int
) -> Iterator[list[float]]:
    """For each row of token ids the log-probability of each token but the first."""
    base, device = base_model(model), next(model.parameters()).device
    collate = Collator(pad_token_id)
    for start in range(0, len(rows), batch_size):
        part = [{"input_ids": row, "labels": row} for row in rows[start : start + batch_size]]
        batch = {name: value.to(device) for name, value in collate(part).items()}
        scored = batch["attention_mask"].bool()
        with evaluating(model):
            values = scored_log_probs(base, batch, scored).cpu()
        for own in values.split((scored[:, 1:].sum(-1)).tolist()):
            yield own.tolist()
