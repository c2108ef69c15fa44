"""Chooses the rollout engine of a job."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from openweights.errors import ConfigError
from openweights.generation.cuda.decoder import UnsupportedModelError
from openweights.generation.engine import RolloutEngine
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
        return _graph_rollout(base_model(model), pad_token_id)
    except UnsupportedModelError as error:
        if name == "cuda_graph":
            raise ConfigError(
                f"sdft_rollout_engine: 'cuda_graph' cannot compute this model ({error}); "
                "use 'auto' or 'transformers'"
            ) from None
        logger.info("rollout engine transformers: cuda_graph cannot compute this model (%s)", error)
        return TransformersRollout(model, pad_token_id)


def _graph_rollout(base: Any, pad_token_id: int) -> RolloutEngine:
    if not torch.cuda.is_available():
        raise UnsupportedModelError("no CUDA GPU is visible")
    from openweights.generation.cuda.graph_rollout import GraphRollout

    engine = GraphRollout(base, pad_token_id)
    logger.info("rollout engine cuda_graph")
    return engine
