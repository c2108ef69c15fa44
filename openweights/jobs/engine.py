"""Loads what a job generates with: a model, its adapters, and the engine that computes it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openweights.generation.choose import generation_engine
from openweights.models.load import load_trained

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
    """Load a model, with its adapter when it has one.

    Raises:
        ConfigError: It cannot be loaded; one line that says why.
    """
    model, tokenizer = load_trained(
        source.base,
        chat_template=chat_template,
        tokenizer_from=None if source.adapter is None else str(source.adapter),
        in_4bit=in_4bit,
    )
    opened = generation_engine(engine, model, tokenizer)
    if source.adapter is not None:
        opened.set_adapter(source.name, source.adapter)
    logger.info("generating with engine %s", opened.name)
    return OpenedModel(opened, tokenizer, None if source.adapter is None else source.name)
