"""Watches over rewards that fail, and ends a run that would train on next to nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from accelerate.utils import gather_object

from openweights.errors import JobFailedError
from openweights.jobs.unsloth.rewards import Reward

logger = logging.getLogger(__name__)

STEPS_IN_A_ROW = 3


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
        found: Counter[str] = Counter()
        for reward in self._rewards:
            found.update({f"{reward.name}: {c}": count for c, count in reward.causes.items()})
        merged = sum(map(Counter, gather_object([dict(found)])), Counter[str]())
        return "; ".join(cause for cause, _ in merged.most_common(3)) or "no cause is known"
