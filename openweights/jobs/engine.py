"""Loads what a job generates with: a model, its adapters, and the engine that computes it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openweights.generation.replicas import Opening, open_replicated
from openweights.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights.generation.engine import GenerationEngine
    from openweights.jobs.model_source import ModelSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is ready to generate.

    Attributes:
        adapter: Name of its adapter in the engine; None for the base model alone.
    """

    engine: GenerationEngine
    tokenizer: PreTrainedTokenizerBase
    adapter: str | None


def open_engine(
    source: ModelSource, engine: Any, chat_template: str = "default", *, in_4bit: bool = False
) -> OpenedModel:
    """Load a model, with its adapter when it has one, on each GPU of the job.

    Raises:
        ConfigError: It cannot be loaded; one line that says why.
    """
    opening = Opening(
        source.base,
        engine,
        chat_template,
        None if source.adapter is None else str(source.adapter),
        in_4bit,
    )
    opened, tokenizer = open_replicated(opening, Settings.from_env().n_gpus)
    if source.adapter is not None:
        opened.set_adapter(source.name, source.adapter)
    logger.info("generating with engine %s", opened.name)
    return OpenedModel(opened, tokenizer, None if source.adapter is None else source.name)
