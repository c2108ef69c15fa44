"""The score of `before_and_after.py`: called as a reward of GRPO is, with lists."""

from __future__ import annotations

from collections.abc import Sequence


def exact(completions: Sequence[str], gold_response: Sequence[str]) -> list[float]:
    """Whether each answer is the right line, and nothing else."""
    return [
        float(answer.strip() == right.strip())
        for answer, right in zip(completions, gold_response, strict=True)
    ]
