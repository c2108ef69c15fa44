"""Log-probabilities of completions under the policy, with rows padded on the right.

trl lays prompts out to the right and completions to the left of one seam. A row then begins with
queries that attend to nothing, whose gradients are NaN on CUDA; here each row is moved to the left
before the forward, which is as wide as the longest of its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy


def completion_logps(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_tokens: int,
    *,
    temperature: float,
    entropy: bool,
    keeps_logits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and, if asked for, entropy of each completion token; shape (B, C), nats.

    Args:
        input_ids: Prompt, padded on the left, and completion, padded on the right; (B, P + C).
        completion_tokens: C.
        temperature: Divides the logits.
        keeps_logits: Whether the model's forward takes positions as `logits_to_keep`.
    """
    width = input_ids.shape[1] - completion_tokens
    pads = attention_mask[:, :width].argmax(1)  # (B,) left padding of each row
    ids, mask = moved_left(input_ids, pads), moved_left(attention_mask, pads)
    # Of each row the first completion token; it is predicted one position before.
    starts = width - pads
    longest = int(attention_mask[:, width:].sum(1).max())
    first, last = int(starts.min()) - 1, int((starts + attention_mask[:, width:].sum(1)).max())
    ids, mask = ids[:, :last], mask[:, :last]
    options = {}
    if keeps_logits:
        options["logits_to_keep"] = torch.arange(first, last - 1, device=ids.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    if not keeps_logits:
        logits = logits[:, first : last - 1]
    targets = ids[:, first + 1 :]  # (B, K)
    places = torch.arange(first + 1, last, device=ids.device)
    counted = mask[:, first + 1 :] * (places >= starts[:, None])
    columns = starts[:, None] - first - 1 + torch.arange(longest, device=ids.device)
    columns = columns.clamp(max=targets.shape[1] - 1)  # behind the end of a row, which counts not
    rest = (0, completion_tokens - longest)
    if not entropy:
        logps = selective_log_softmax(logits, targets, temperature=temperature, row_mask=counted)
        return nn.functional.pad(logps.gather(1, columns), rest), None
    logps, entropies = selective_log_softmax_and_entropy(
        logits, targets, entropy_requires_grad=False, temperature=temperature, row_mask=counted
    )
    found = (logps.gather(1, columns), entropies.gather(1, columns))
    return nn.functional.pad(found[0], rest), nn.functional.pad(found[1], rest)


def moved_left(rows: Tensor, by: Tensor) -> Tensor:
    """Each row of (B, T) turned round to the left by its own number of places."""
    places = torch.arange(rows.shape[1], device=rows.device) + by[:, None]
    return rows.gather(1, places % rows.shape[1])
