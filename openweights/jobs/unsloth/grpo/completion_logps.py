"""Log-probabilities of completions under the policy, with rows padded on the right.

trl lays prompts out to the right and completions to the left of one seam. A row then begins with
queries that attend to nothing, whose gradients are NaN on CUDA; here each row is moved to the left
before the forward, which is as wide as the longest of its own rows. Completions then begin at as
many places as prompts have lengths, and the output head is shown of each row those that predict its
own: logits over the vocabulary are by far the largest tensor of a step, and most of those of the
columns between the shortest and the longest prompt would be for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy


def completion_logps(
    model: Any,
    head: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_tokens: int,
    *,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and, if asked for, entropy of each completion token; shape (B, C), nats.

    Args:
        head: The model's output head.
        input_ids: Prompt, padded on the left, and completion, padded on the right; (B, P + C).
        completion_tokens: C.
        temperature: Divides the logits.
    """
    width = input_ids.shape[1] - completion_tokens
    pads = attention_mask[:, :width].argmax(1)  # (B,) left padding of each row
    # Of each row the first completion token; it is predicted one position before.
    starts, lengths = width - pads, attention_mask[:, width:].sum(1)
    longest, last = int(lengths.max()), int((starts + lengths).max())
    ids, mask = moved_left(input_ids, pads)[:, :last], moved_left(attention_mask, pads)[:, :last]
    places = starts[:, None] - 1 + torch.arange(longest, device=ids.device)  # (B, K)
    places = places.clamp(max=last - 1)  # behind the end of a row, which counts not
    with reading_only(head, places):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    own = slice(width, width + longest)
    targets, counted = input_ids[:, own], attention_mask[:, own]
    rest = (0, completion_tokens - longest)
    if not entropy:
        logps = selective_log_softmax(logits, targets, temperature=temperature, row_mask=counted)
        return nn.functional.pad(logps, rest), None
    logps, entropies = selective_log_softmax_and_entropy(
        logits, targets, entropy_requires_grad=False, temperature=temperature, row_mask=counted
    )
    return nn.functional.pad(logps, rest), nn.functional.pad(entropies, rest)


@contextmanager
def reading_only(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside, the output head reads of each row's hidden states (B, T, H) those at its own places,
    shape (B, K).
    """

    def gathered(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = given
        index = places[:, :, None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index), *others

    handle = head.register_forward_pre_hook(gathered)
    try:
        yield
    finally:
        handle.remove()


def moved_left(rows: Tensor, by: Tensor) -> Tensor:
    """Each row of (B, T) turned round to the left by its own number of places."""
    places = torch.arange(rows.shape[1], device=rows.device) + by[:, None]
    return rows.gather(1, places % rows.shape[1])
