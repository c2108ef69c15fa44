"""Advantages of GRPO (arXiv 2402.03300): how much better a completion is than its siblings.

    A_i = (r_i - mean of the group) / (standard deviation + 1e-4)

with the sample deviation (n - 1) of the group, of the whole batch, or without division (Dr. GRPO,
arXiv 2503.20783), as in trl. Where we differ: a completion whose reward failed (NaN) is left out of
mean and deviation and gets exactly 0, so do all of a group with fewer than two rewards; and sums
are in float64, so that rewards that are all alike give exactly 0 rather than amplified rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4


def group_advantages(rewards: Tensor, group_size: int, scale: Scale) -> Tensor:
    """Advantages of rewards of shape (B * G,), of which `group_size` G in a row are siblings.

    Returns:
        Shape (B * G,), in the type of `rewards`; finite.
    """
    groups = rewards.double().view(-1, group_size)  # (B, G)
    valid = groups.isfinite()
    counts = valid.sum(1, keepdim=True)  # (B, 1)
    usable = valid & (counts > 1)
    values = groups.where(valid, torch.zeros_like(groups))
    centred = (values - values.sum(1, keepdim=True) / counts.clamp(min=1)) * usable
    if scale == "group":
        variance = (centred**2).sum(1, keepdim=True) / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)
    elif scale == "batch":
        every = values[valid]
        deviation = every.std() if len(every) > 1 else every.new_zeros(())
        centred = centred / (deviation + EPSILON)
    return centred.flatten().to(rewards.dtype)


def has_signal(rewards: Tensor, group_size: int) -> bool:
    """Whether some group has two rewards or more; without one there is nothing to learn from."""
    return bool((rewards.view(-1, group_size).isfinite().sum(1) > 1).any())
