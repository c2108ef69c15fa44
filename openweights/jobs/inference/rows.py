"""Rows of an inference job: what each asks for. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from openweights.client.messages import Problems
from openweights.generation.params import SamplingParams, derived_seed
from openweights.generation.prompts import chat_prompt_ids, text_prompt_ids
from openweights.jobs.unsloth.config.rows import numbered_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights.jobs.inference.config import InferenceConfig

Row = Mapping[str, Any]


def check_input(lines: Iterable[bytes], source: str = "") -> int:
    """See that each row can be answered; returns how many there are.

    Args:
        source: The name of their file, where that is known.

    Raises:
        DatasetError: One cannot; a line for each of the first, with its number and field.
    """
    problems, count = Problems("input_file_id"), 0
    for number, row in numbered_rows(lines):
        count += 1
        for field, what in _problems(row):
            problems.add(number, field, what)
    problems.raise_if_any(rows=count, source=source)
    return count


def _problems(row: Row) -> Iterable[tuple[str, str]]:
    messages = row.get("messages")
    if not messages and not row.get("text"):
        yield "messages", "is missing; give the conversation, or a `text` to go on with"
    limit, temperature = row.get("max_tokens"), row.get("temperature")
    if limit is not None and (type(limit) is not int or limit < 1):
        yield "max_tokens", f"is {limit!r}; give a whole number of at least 1, or leave it out"
    if temperature is not None and not _is_temperature(temperature):
        yield "temperature", f"is {temperature!r}; give a number of at least 0, or leave it out"


def _is_temperature(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def row_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, config: InferenceConfig) -> list[int]:
    """The tokens that the model continues.

    Raises:
        ValueError: The template refuses the conversation.
    """
    if not row.get("messages"):
        return text_prompt_ids(tokenizer, row["text"] + config.prefill)
    return chat_prompt_ids(
        tokenizer,
        row["messages"],
        prefill=config.prefill,
        tools=row.get("tools"),
        options=config.template_options,
    )


def fitting_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, config: InferenceConfig, context: int
) -> list[int]:
    """`row_prompt`, where it leaves room for an answer.

    Args:
        context: Tokens that prompt and answer may have together.

    Raises:
        ValueError: It does not, is empty, or the template refuses the conversation.
    """
    prompt = row_prompt(row, tokenizer, config)
    if not prompt:
        raise ValueError("the prompt is empty; give it text")
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and the context {context}; shorten it"
        )
    return prompt


def row_sampling(row: Row, index: int, config: InferenceConfig, room: int) -> SamplingParams:
    """How the completions of a row are drawn.

    Args:
        room: Tokens that its prompt leaves.
    """
    given, temperature = row.get("max_tokens"), row.get("temperature")
    limit = min(config.max_tokens if given is None else given, room)
    return SamplingParams(
        max_new_tokens=limit,
        min_new_tokens=min(config.min_tokens, limit),
        temperature=float(config.temperature if temperature is None else temperature),
        top_p=config.top_p,
        n=config.n_completions_per_prompt,
        stop=tuple(config.stop),
        logprobs=config.logprobs is not None,
        top_logprobs=config.logprobs or 0,
        seed=derived_seed(config.seed, index),
    )
