"""Log-probabilities of completions under the policy, without padding on the left.

trl lays prompts out to the right and completions to the left of one seam. A row then begins with
queries that attend to nothing, whose gradients are NaN on CUDA. Here rows are laid end to end, or
moved to the left where the model does not keep packed rows apart; and only the hidden states that
predict a completion's tokens go through the head, some at a time, so that the logits of a batch are
never there at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openweights.models.log_probs import token_scores
from openweights.models.tokens import borders


def completion_logps(
    base: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_tokens: int,
    *,
    temperature: float,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each completion token, in nats; shape (B, C), 0 for padding.

    The entropy has no gradient.

    Args:
        base: The causal language model itself (`forward.base_model`).
        input_ids: Prompt, padded on the left, and completion, padded on the right; (B, P + C).
        completion_tokens: C.
        temperature: Divides the logits.
        packed: Whether the model keeps packed rows apart (`packing.may_pack`).
    """
    completions = attention_mask.bool().clone()
    completions[:, :-completion_tokens] = False
    lay_out = _packed if packed else _padded_right
    batch, scored = lay_out(input_ids, attention_mask, completions)
    scores = token_scores(base, batch, scored, temperature=temperature)
    counted = completions[:, -completion_tokens:]
    return _on_a_grid(scores.log_probs, counted), _on_a_grid(scores.entropy, counted)


def _packed(ids: Tensor, mask: Tensor, completions: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The rows (B, T) end to end, as a batch of shape (1, N), and what of it is scored."""
    present = mask.bool()
    batch: dict[str, Any] = {
        "input_ids": ids[present][None],
        "position_ids": (present.cumsum(1) - 1)[present][None],
    }
    for name, value in borders(present.sum(1).tolist()).items():
        batch[name] = value.to(ids.device) if isinstance(value, Tensor) else value
    return batch, completions[present][None]


def _padded_right(ids: Tensor, mask: Tensor, completions: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The rows (B, T), each turned round to the left by the padding before it."""
    places = torch.arange(ids.shape[1], device=ids.device) + mask.argmax(1)[:, None]
    ids, mask, completions = (
        rows.gather(1, places % ids.shape[1]) for rows in (ids, mask, completions)
    )
    return {"input_ids": ids, "attention_mask": mask}, completions


def _on_a_grid(values: Tensor, counted: Tensor) -> Tensor:
    """Values of true positions, in their order, at these positions of shape (B, C)."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)
