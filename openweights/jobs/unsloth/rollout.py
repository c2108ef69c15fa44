"""Sampling completions from the student while it trains: the on-policy half of self-distillation.

An engine takes all prompts of one optimizer step and returns one completion each. Sampling is a
function of the weights, the prompts and the seed alone: the generator's state outside is untouched,
so a resumed run samples what the uninterrupted one would have.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig


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


class TransformersRollout:
    """`generate` of transformers: works wherever the model does.

    Args:
        model: A causal language model, adapters included, whose `generate` uses its current
            weights.
        pad_token_id: Fills prompts up on the left.
    """

    def __init__(self, model: nn.Module, pad_token_id: int) -> None:
        self._model: Any = model
        self._pad_token_id = pad_token_id

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> Rollout:
        """See `RolloutEngine`."""
        started = time.perf_counter()
        device = next(self._model.parameters()).device
        ids, mask = pad_left(prompts, self._pad_token_id, device)
        with evaluating(self._model), seeded(seed, device), self._sampling(params) as config:
            output = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config
            )
        rows = output[:, ids.shape[1] :].tolist()
        cut = [cut_at_eos(row, params.eos_token_ids) for row in rows]
        return Rollout(
            completions=[row for row, _ in cut],
            ended=[ended for _, ended in cut],
            seconds=time.perf_counter() - started,
        )

    @contextmanager
    def _sampling(self, params: SamplingParams) -> Iterator[GenerationConfig]:
        """A generation config that holds only ours.

        transformers fills what a config leaves at its default from the model's own config, which
        for many instruct models holds a repetition penalty or top-k: those would make the samples
        off-policy.
        """
        config = GenerationConfig(
            do_sample=params.temperature > 0,
            temperature=params.temperature or None,
            top_p=params.top_p if params.temperature > 0 else None,
            top_k=0 if params.temperature > 0 else None,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.eos_token_ids),
            pad_token_id=self._pad_token_id,
            use_cache=True,
        )
        holders = [m for m in self._model.modules() if hasattr(m, "generation_config")]
        own = [m.generation_config for m in holders]
        for holder in holders:
            holder.generation_config = config
        try:
            yield config
        finally:
            for holder, kept in zip(holders, own, strict=True):
                holder.generation_config = kept


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of shape (B, T), padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def cut_at_eos(row: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[list[int], bool]:
    """The row up to and with its first EOS, and whether there is one."""
    for position, token in enumerate(row):
        if token in eos_token_ids:
            return list(row[: position + 1]), True
    return list(row), False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; the model's mode afterwards is what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


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
