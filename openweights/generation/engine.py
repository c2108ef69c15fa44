"""What an engine is: all prompts of a call in, a completion for each out.

Sampling is a function of the weights, the prompts and the seed alone: the generator's state outside
is untouched, so a resumed run samples what the uninterrupted one would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from openweights.generation.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion for each prompt, in their order.

    Attributes:
        completions: Token ids without padding; the last one is an EOS when the completion ended by
            itself.
        ended: Whether it did.
        seconds: Wall-clock time of the call.
    """

    completions: list[list[int]]
    ended: list[bool]
    seconds: float

    @property
    def tokens(self) -> int:
        """Generated tokens in all."""
        return sum(map(len, self.completions))


class RolloutEngine(Protocol):
    """Draws completions from a model's current weights."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> Rollout:
        """One sampled completion for each prompt, all in one call."""
        ...


def cut_at_eos(row: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[list[int], bool]:
    """The row up to and with its first EOS, and whether there is one."""
    for position, token in enumerate(row):
        if token in eos_token_ids:
            return list(row[: position + 1]), True
    return list(row), False


def derived_seed(*parts: int) -> int:
    """A seed for a step, a rank or a batch that does not depend on what was sampled before."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start at `seed` inside, and are afterwards what they were before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
