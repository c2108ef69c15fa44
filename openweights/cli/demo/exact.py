"""The score of the demo's evaluations, which are told of this file: called as a reward of GRPO."""

from __future__ import annotations

from collections.abc import Sequence


def exact(completions: Sequence[str], gold_response: Sequence[str]) -> list[float]:
    """Whether each answer is the demonstration itself."""
    return [
        float(answer.strip() == gold)
        for answer, gold in zip(completions, gold_response, strict=True)
    ]
