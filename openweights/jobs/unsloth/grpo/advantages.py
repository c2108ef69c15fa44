"""Advantages of GRPO (arXiv 2402.03300): how much better a completion is than its siblings.

    A_i = (r_i - mean of the group) / (standard deviation + 1e-4)

with the sample deviation (n - 1) of the group, of the whole batch, or without division (Dr. GRPO,
arXiv 2503.20783), as in trl. Where we differ: a completion whose reward failed (NaN) is left out of
mean and deviation and gets exactly 0, so do all of a group with fewer than two rewards; and sums
are in float64, so that rewards that are all alike give exactly 0 rather than amplified rounding.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor

from openweights.errors import JobFailedError
from openweights.jobs.unsloth.rewards import Reward

logger = logging.getLogger(__name__)

Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4
STEPS_IN_A_ROW = 3


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


class FailedRewards:
    """Counts, over all ranks, the completions of each step that have no reward.

    Args:
        limit: Larger shares than this end the run when they come `STEPS_IN_A_ROW` times.
    """

    def __init__(self, rewards: Sequence[Reward], limit: float) -> None:
        self._rewards = rewards
        self._limit = limit
        self._steps = 0

    def record(self, step: int, failed: int, total: int) -> None:
        """Take note of a step; every rank must call this with the same numbers.

        Raises:
            JobFailedError: Too many failed, too often; with the causes.
        """
        self._steps = self._steps + 1 if failed > self._limit * total else 0
        if not failed:
            return
        causes = self._causes()
        logger.warning("step %d: %d of %d rewards failed: %s", step, failed, total, causes)
        if self._steps >= STEPS_IN_A_ROW:
            raise JobFailedError(
                f"{failed} of {total} completions got no reward, and in each of the last "
                f"{STEPS_IN_A_ROW} steps more than grpo_max_failed_reward_fraction={self._limit:g} "
                f"of them: {causes}; see to that first, as there is nothing to learn from"
            )

    def _causes(self) -> str:
        """The most frequent causes of the step, over all ranks."""
        causes: Counter[str] = Counter()
        for reward in self._rewards:
            causes.update({f"{reward.name}: {c}": count for c, count in reward.causes.items()})
        merged = sum(map(Counter, gather_object([dict(causes)])), Counter[str]())
        return "; ".join(cause for cause, _ in merged.most_common(3)) or "no cause is known"
