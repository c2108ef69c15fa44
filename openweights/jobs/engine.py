"""Loads what a job generates with: models of one base, and the engine that computes them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from openweights.generation.replicas import Opening, ReplicatedEngine, open_replicated
from openweights.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights.generation.engine import GenerationEngine
    from openweights.jobs.model_source import ModelSource

logger = logging.getLogger(__name__)


@contextmanager
def open_engine(
    sources: Sequence[ModelSource],
    engine: Any,
    chat_template: str = "default",
    *,
    in_4bit: bool = False,
) -> Generator[tuple[GenerationEngine, PreTrainedTokenizerBase]]:
    """The base of `sources` on each GPU of the job, without their adapters yet, and a tokenizer:
    the base's, or that of the only adapter.

    Raises:
        ConfigError: It cannot be loaded; one line that says why.
    """
    only = sources[0].adapter if len(sources) == 1 else None
    tokenizer_from = None if only is None else str(only)
    adapters = tuple(source.adapter for source in sources if source.adapter is not None)
    opening = Opening(
        sources[0].base, engine, chat_template, tokenizer_from, in_4bit, adapters=adapters
    )
    opened, tokenizer = open_replicated(opening, Settings.from_env().n_gpus)
    logger.info("generating with engine %s", opened.name)
    try:
        yield opened, tokenizer
    finally:
        if isinstance(opened, ReplicatedEngine):
            opened.close()
