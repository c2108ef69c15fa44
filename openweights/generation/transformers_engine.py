"""Sampling through `generate` of transformers, which works wherever the model does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from openweights.generation.engine import Rollout, cut_at_eos, seeded
from openweights.generation.params import SamplingParams
from openweights.models.forward import evaluating
from openweights.models.tokens import pad_left


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
        cut = [cut_at_eos(row, params.stop_token_ids or ()) for row in rows]
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
            eos_token_id=list(params.stop_token_ids or ()),
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
