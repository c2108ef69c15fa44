"""Rotary tables by the length of a row: each row has its own, whatever is beside it.

Models with LongRoPE (Phi 3, Phi MoE; https://arxiv.org/abs/2402.13753) turn rows of up to so many
positions, those they were first trained with, by one table, and longer ones by another. Their code
in transformers chooses by the longest row of a forward, so a short row would be read otherwise
beside a long one. Here it chooses for each row: padded, packed, or growing in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from openweights.models.forward import decoder_of
from openweights.models.shape import LONGROPE, short_length


def turn_by_row(base: Any) -> None:
    """Let a causal language model with LongRoPE choose the table for each row; others stay as they
    are, and so do those whose rotary code is not that of transformers.
    """
    if short_length(base.config.get_text_config()) is None:
        return
    for module in base.modules():
        if _is_by_length(module) and not hasattr(module, "of_one_length"):
            module.of_one_length = module.forward
            # A method, which a copy of the model binds to its own module.
            module.forward = MethodType(_turned_by_row, module)
            if not getattr(decoder_of(base), "tells_positions", False):
                decoder_of(base).tells_positions = True
                decoder_of(base).register_forward_pre_hook(_tell_positions, with_kwargs=True)


def _is_by_length(module: nn.Module) -> bool:
    kind: Any = getattr(module, "rope_type", None)
    return LONGROPE in (kind.values() if isinstance(kind, Mapping) else [kind])


def _turned_by_row(module: Any, x: Tensor, position_ids: Tensor, **given: Any) -> Any:
    """Cosines and sines of shape (B, T, D), by positions of shape (B, T)."""
    limit = short_length(module.config)
    assert limit is not None
    table = module.of_one_length(x, position_ids=position_ids, **given)
    is_long = in_long_rows(position_ids, limit)
    if is_long.all() or not is_long.any():
        return table
    short = module.of_one_length(x, position_ids=position_ids.masked_fill(is_long, 0), **given)
    return tuple(torch.where(is_long[..., None], a, b) for a, b in zip(table, short, strict=True))


def in_long_rows(positions: Tensor, limit: int) -> Tensor:
    """Which positions of shape (B, T) belong to a row of more than `limit`. A row begins where they
    do not rise, as rows do that are laid end to end.
    """
    begins = positions[:, 1:] <= positions[:, :-1]
    rows = nn.functional.pad(begins.long().cumsum(-1), (1, 0))
    longest = torch.zeros_like(positions).scatter_reduce(1, rows, positions, "amax")
    return longest.gather(1, rows) >= limit


def _tell_positions(decoder: Any, args: Any, given: dict[str, Any]) -> Any:
    """Positions of padded rows, each of which would have as many as the widest."""
    del decoder
    mask = given.get("attention_mask")
    if given.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
        possible = (*args[:1], given.get("input_ids"), given.get("inputs_embeds"))
        tokens = next(values for values in possible if values is not None)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        given = {**given, "position_ids": positions[:, -tokens.shape[1] :]}
    return args, given
