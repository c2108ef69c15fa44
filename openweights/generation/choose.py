"""Chooses the engine that generates with a model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.errors import ConfigError, ConfigurationError
from openweights.generation.cuda.decoder import check_supported
from openweights.generation.cuda.linear import UnsupportedModelError
from openweights.generation.engine import GenerationEngine
from openweights.generation.transformers_engine import MAX_ROWS, TransformersEngine
from openweights.models.adapters import not_plain
from openweights.models.forward import base_model
from openweights.models.sharding import is_spread

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "transformers", "cuda_graph", "vllm"]
Precision = Literal["model", "fp8"]


def generation_engine(
    name: EngineName,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: Precision = "model",
    scaled_logprobs: bool = False,
    rows: int | None = None,
    adapters: Sequence[Path] = (),
) -> GenerationEngine:
    """The engine called `name`; "auto" takes `cuda_graph` wherever it can compute the model.

    `cuda_graph` is the faster one wherever both can compute the model; how much faster is in
    `tests/benchmarks/RESULTS.md`.

    Args:
        precision: "fp8" lets `cuda_graph` decode with fp8 copies of the weights; the others
            compute with the model's own.
        scaled_logprobs: Whether log-probabilities will be asked for after the temperature, which a
            vLLM engine must know when it is made.
        rows: Samples that grow at a time; None for what is best for the engine. vLLM's own
            scheduler decides by its memory.
        adapters: Folders of those that it will be given, as far as they are known.

    Raises:
        ConfigError: `cuda_graph` was asked for and cannot compute this model here, or the model is
            spread over several GPUs, where `transformers` alone can.
        ConfigurationError: vLLM was asked for and is not installed.
    """
    if is_spread(model):
        if name not in ("auto", "transformers"):
            raise ConfigError(
                f"engine {name}: needs the whole model on one GPU, and its layers are spread over "
                "several; use 'auto' or 'transformers'"
            )
        return TransformersEngine(model, tokenizer, max_rows=rows or MAX_ROWS)
    if name == "vllm":
        return _vllm(model, tokenizer, scaled_logprobs)
    if name != "transformers":
        try:
            for what in filter(None, map(not_plain, adapters)):
                raise UnsupportedModelError(what)
            return _cuda_graph(model, tokenizer, precision, rows)
        except UnsupportedModelError as error:
            if name == "cuda_graph":
                raise ConfigError(
                    f"engine cuda_graph: cannot compute this model ({error}); use 'auto' or "
                    "'transformers'"
                ) from None
            if torch.cuda.is_available():
                logger.info("generation by transformers: cuda_graph cannot (%s)", error)
    return TransformersEngine(model, tokenizer, max_rows=rows or MAX_ROWS)


def _cuda_graph(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, precision: Precision, rows: int | None
) -> GenerationEngine:
    if not torch.cuda.is_available():
        check_supported(base_model(model))
        raise UnsupportedModelError("no CUDA GPU is visible")
    from openweights.generation.cuda.graph_engine import CudaGraphEngine

    given = {} if rows is None else {"rows": rows}
    engine = CudaGraphEngine(model, tokenizer, precision=precision, **given)
    logger.info("generation by cuda_graph")
    return engine


def _vllm(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, scaled_logprobs: bool
) -> GenerationEngine:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "engine vllm: is not installed here; use 'auto', or an image that has it"
        )
    from openweights.generation.vllm_engine import VLLMEngine

    return VLLMEngine(model, tokenizer, scaled_logprobs=scaled_logprobs)
