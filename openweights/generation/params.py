"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Completions are cut here.
        temperature: Above 0; 1 samples from the model itself.
        top_p: Nucleus; 1 for the whole vocabulary.
        eos_token_ids: Each of them ends a completion and is part of it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_ids: tuple[int, ...]
