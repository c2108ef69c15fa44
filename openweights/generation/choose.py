"""Chooses the rollout engine of a job."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from openweights.errors import ConfigError
from openweights.generation.cuda.decoder import check_supported
from openweights.generation.cuda.linear import UnsupportedModelError
from openweights.generation.engine import Rollout, RolloutEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.transformers_engine import TransformersRollout
from openweights.models.forward import base_model

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "transformers", "cuda_graph"]


def rollout_engine(name: EngineName, model: nn.Module, pad_token_id: int) -> RolloutEngine:
    """The engine called `name`; "auto" takes `cuda_graph` wherever it can compute the model.

    `cuda_graph` is the faster one wherever both can compute the model; how much faster is in
    `tests/benchmarks/RESULTS.md`.

    Raises:
        ConfigError: `cuda_graph` was asked for and cannot compute this model here.
    """
    if name == "transformers":
        return TransformersRollout(model, pad_token_id)
    try:
        return _graph_rollout(model)
    except UnsupportedModelError as error:
        if name == "cuda_graph":
            raise ConfigError(
                f"sdft_rollout_engine: 'cuda_graph' cannot compute this model ({error}); "
                "use 'auto' or 'transformers'"
            ) from None
        logger.info("rollout engine transformers: cuda_graph cannot compute this model (%s)", error)
        return TransformersRollout(model, pad_token_id)


def _graph_rollout(model: nn.Module) -> RolloutEngine:
    if not torch.cuda.is_available():
        check_supported(base_model(model))
        raise UnsupportedModelError("no CUDA GPU is visible")
    engine = _GraphRollout(model)
    logger.info("rollout engine cuda_graph")
    return engine


class _GraphRollout(RolloutEngine):
    """`CudaGraphEngine` with one completion for each prompt."""

    def __init__(self, model: nn.Module) -> None:
        from openweights.generation.cuda.graph_engine import CudaGraphEngine

        self._engine = CudaGraphEngine(model, None)
        self._adapter = next(iter(self._engine.adapters), None)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> Rollout:
        """See `RolloutEngine`."""
        started = time.perf_counter()
        params = replace(params, detokenize=False)
        requests = [
            GenerationRequest(prompt, params.with_seed(seed, index), self._adapter)
            for index, prompt in enumerate(prompts)
        ]
        found = [own[0] for own in self._engine.generate(requests)]
        seconds = time.perf_counter() - started
        return Rollout([c.token_ids for c in found], [c.ended for c in found], seconds)
