"""Log-probabilities of tokens, equal to those of a plain forward.

Only the positions that are scored go through the output head, some at a time, so that logits over
the vocabulary are never held for a whole batch.

The gradient of log p(t) in the logits z is e_t - softmax(z), whatever is made of log p(t) later. So
it is taken to the hidden states, W^T (e_t - softmax(z)), while a chunk's logits are there: vectors
of the hidden size are kept instead of the vocabulary's, and the backward pass scales them with what
the loss says of each token. Every loss on log-probabilities uses this. The usual fused losses
sum to a scalar and build the head's gradient; ours is per token, for frozen heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openweights import progress
from openweights.errors import ConfigError
from openweights.models.forward import (
    HALF,
    Head,
    base_model,
    evaluating,
    frozen_head,
    output_logits,
    row_groups,
)
from openweights.models.packing import last_hidden, row_numbers
from openweights.models.tokens import IGNORED, Collator

_CHECKED_TOKENS = 8
# How far, of their size, a row's hidden states may be from those that it has alone.
_FAR, _FAR_IN_HALF = 1e-2, 0.5
CHUNK_TOKENS = 1024  # so many rows of logits are there at a time


class TokenScores(NamedTuple):
    """What a model says of N tokens, each of shape (N,), in at least float32.

    Attributes:
        log_probs: Of each token given those before it, in nats; the only one with a gradient.
        entropy: Of the distribution that it was drawn from, in nats.
        is_top: 1 where it is the likeliest token, else 0.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top: Tensor


def scored_log_probs(base: Any, batch: Mapping[str, Tensor], scored: Tensor) -> Tensor:
    """`TokenScores.log_probs` of `token_scores`."""
    return token_scores(base, batch, scored).log_probs


def token_scores(
    base: Any, batch: Mapping[str, Tensor], scored: Tensor, *, temperature: float = 1.0
) -> TokenScores:
    """What the model says of the scored tokens, packed in row order.

    Args:
        base: The causal language model itself (`forward.base_model`).
        batch: `input_ids` of shape (B, T), with `attention_mask` or `position_ids`.
        scored: Which tokens, shape (B, T); the first of a row is never one.
        temperature: Divides the logits.
    """
    hidden = last_hidden(base, batch)  # (B, T, H)
    wanted = scored[:, 1:]
    hidden, targets = hidden[:, :-1][wanted], batch["input_ids"][:, 1:][wanted]
    head = frozen_head(base)
    if head is not None:
        head = head.at_temperature(temperature)
        return linear_scores(hidden, head, targets, chunk_tokens=CHUNK_TOKENS)
    scores = partial(_plain_scores, base, temperature)
    parts = [
        # The logits of a chunk are made again in the backward pass instead of being kept.
        checkpoint(scores, rows, tokens, use_reentrant=False)
        if rows.requires_grad
        else scores(rows, tokens)
        for rows, tokens in zip(
            hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        )
    ]
    return TokenScores(*map(torch.cat, zip(*parts, strict=True)))


def check_logits(base: Any, name: str) -> None:
    """See that a model's logits are what is made here of its last hidden states, and that a row
    which is padded beside a longer one has those that it has alone.

    Raises:
        ConfigError: They are not, or are no numbers: its head does more, its layers are not where
            they are looked for, or it sees what is padded, or what comes later.
    """
    ids = torch.arange(_CHECKED_TOKENS, device=base.device)[None]
    with evaluating(base):
        expected = base(input_ids=ids, use_cache=False).logits[0].float()
        try:
            alone = last_hidden(base, {"input_ids": ids})[0]
            found = output_logits(base, alone)
        except (AttributeError, RuntimeError, TypeError):
            alone = found = expected.new_empty(0)
    if bool(expected.isnan().any()):
        raise ConfigError(
            f"model: the logits of {name} are no numbers (NaN): its weights are broken, or too "
            f"large for {base.dtype}; use another copy of it, or another model"
        )
    same = found.shape == expected.shape
    if not same or float((found - expected).abs().max()) > 2e-2 * float(expected.abs().max()):
        raise ConfigError(
            f"model: {name} is a {type(base).__name__}, whose logits are not computed from its "
            "last hidden states as is known here; use another model"
        )
    if not _is_own_when_padded(base, ids[0], alone):
        raise ConfigError(
            f"model: {name} is a {type(base).__name__}, which scores rows that are padded in a "
            "batch otherwise than alone; use another model"
        )


def _is_own_when_padded(base: Any, ids: Tensor, hidden: Tensor) -> bool:
    """Whether the first half of a row, beside a longer one, has the hidden states (T, H) that it
    has at the beginning of the whole row.
    """
    half = len(ids) // 2
    mask = torch.ones(2, len(ids), dtype=torch.long, device=ids.device)
    mask[1, half:] = 0
    rows = torch.stack([ids.flip(0), ids]) * mask
    with evaluating(base):
        padded = last_hidden(base, {"input_ids": rows, "attention_mask": mask})[1, :half].float()
    alone = hidden[:half].float()
    # Rounding in half precision may choose another expert.
    far = _FAR_IN_HALF if base.dtype in HALF else _FAR
    return float((padded - alone).norm()) <= far * float(alone.norm())


def _plain_scores(base: Any, temperature: float, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Through a head that is trained, too."""
    logits = output_logits(base, hidden) / temperature  # (N, V)
    own = logits.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        log_p = logits.log_softmax(-1)
        entropy, is_top = -(log_p.exp() * log_p).sum(-1), logits.argmax(-1) == targets
    return TokenScores(own - logits.logsumexp(-1), entropy, is_top.to(logits.dtype))


def linear_scores(hidden: Tensor, head: Head, targets: Tensor, *, chunk_tokens: int) -> TokenScores:
    """What a frozen head says of N tokens.

    Args:
        hidden: Last hidden states that predict them, shape (N, H).
        targets: The tokens' ids, shape (N,).
        chunk_tokens: Tokens whose logits are alive at a time.
    """
    return TokenScores(*_LinearScores.apply(hidden, head, targets, chunk_tokens))


class _LinearScores(torch.autograd.Function):
    """Takes each token's gradient to its hidden state while the chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        stats = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        fused = hidden.is_cuda and hidden.dtype != torch.float64
        score = _score_fused if fused else _score
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part = None if grad is None else grad[rows]
            score(hidden[rows], head, targets[rows], stats[:, rows], part)
        ctx.save_for_backward(grad)
        log_probs, entropy, is_top = stats
        ctx.mark_non_differentiable(entropy, is_top)
        return log_probs, entropy, is_top

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        return (grad * grad_outputs[0][:, None]).to(grad.dtype), None, None, None


def _score(hidden: Tensor, head: Head, targets: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    """Fill in a chunk's `TokenScores` (3, N), and the gradient of its hidden states."""
    logits, index = head.logits(hidden), targets[:, None]
    raw_grad = None
    if grad is not None:
        raw_grad = torch.empty_like(logits, dtype=head.grad_dtype(logits.dtype))
    for rows in row_groups(logits):
        log_p = logits[rows].log_softmax(-1)
        stats[0, rows] = log_p.gather(-1, index[rows]).squeeze(-1)
        stats[2, rows] = log_p.argmax(-1) == targets[rows]
        p = log_p.exp()
        stats[1, rows] = -torch.linalg.vecdot(p, log_p)
        if raw_grad is not None:
            ones = torch.ones_like(index[rows], dtype=p.dtype)
            logits_grad = p.neg_().scatter_add_(-1, index[rows], ones)
            raw_grad[rows] = head.raw_grad(logits[rows], logits_grad)
    if grad is not None and raw_grad is not None:
        grad.copy_(head.grad_through(raw_grad))


def _score_fused(
    hidden: Tensor, head: Head, targets: Tensor, stats: Tensor, grad: Tensor | None
) -> None:
    """`_score` on CUDA: logits in float32, two passes over them, gradient in the head's type."""
    from openweights.models.log_prob_kernel import log_prob_kernel

    logits = head.raw_logits(hidden)
    logits_grad = None if grad is None else torch.empty_like(logits, dtype=head.weight.dtype)
    # The kernel writes each statistic in one piece.
    parts = tuple(torch.empty_like(row) for row in stats)
    log_prob_kernel(logits, targets, logits_grad, parts, head.scale, head.softcap)
    torch.stack(parts, out=stats)
    if grad is not None and logits_grad is not None:
        grad.copy_(logits_grad @ head.weight)


def answer_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels of each row, and how many there are; both of shape (B,).

    Rows may be laid end to end.
    """
    scored = batch["labels"] != IGNORED
    values = scored_log_probs(base_model(model), batch, scored)
    rows, count = row_numbers(scored, batch.get("cu_seq_lens_q"))
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums, rows.bincount(minlength=count)


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
        progress.advanced(len(sums))
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
        progress.advanced(len(part))
        for own in values.split((scored[:, 1:].sum(-1)).tolist()):
            yield own.tolist()
