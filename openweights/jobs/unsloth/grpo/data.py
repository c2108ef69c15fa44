"""Rows of GRPO: prompts for the trainer, and the rows themselves for the reward functions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.grpo_fields import GOLD, split_gold
from openweights.jobs.unsloth.config.rows import named_row
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.template import Message, prompt_token_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GRPORows:
    """A dataset's rows that are used.

    Attributes:
        prompts: What is answered; `row` is an index into the rows of the run.
        rows: All columns of each but its messages, with `gold_response`.
    """

    prompts: Dataset
    rows: list[dict[str, Any]]


def grpo_rows(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    name: str = "training_file",
    first: int = 0,
) -> GRPORows:
    """Prompts and columns of the rows whose prompt leaves room for a completion.

    The columns stay outside the trainer's dataset: those of JSON rows need not have one type each.

    Args:
        name: What the rows are called in messages.
        first: Index of the first row.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    limit = config.max_seq_length - config.grpo_max_completion_length
    prompts: list[list[Message]] = []
    kept: list[dict[str, Any]] = []
    longest = 0
    for number, row in enumerate(rows, start=1):
        with named_row(name, number):
            prompt, gold = split_gold(row)
            length = len(prompt_token_ids(tokenizer, prompt, **template_options(config)))
        longest = max(longest, length)
        if length <= limit:
            prompts.append(prompt)
            kept.append({**{k: v for k, v in row.items() if k != "messages"}, GOLD: gold})
    _report(config, name, len(rows), len(kept), longest)
    columns = {"prompt": prompts, "row": list(range(first, first + len(kept)))}
    return GRPORows(Dataset.from_dict(columns), kept)


def _report(config: TrainingConfig, name: str, given: int, kept: int, longest: int) -> None:
    room = config.grpo_max_completion_length
    if not kept:
        raise DatasetError(
            f"{name}: no row fits: prompts have up to {longest} tokens, and max_seq_length="
            f"{config.max_seq_length} leaves {config.max_seq_length - room} beside "
            f"grpo_max_completion_length={room}; raise max_seq_length to {longest + room}"
        )
    logger.info("%s: %d rows, prompts of up to %d tokens", name, kept, longest)
    if kept < given:
        logger.warning(
            "%s: %d of %d rows dropped: their prompt leaves less than grpo_max_completion_length="
            "%d tokens of max_seq_length=%d",
            name, given - kept, given, room, config.max_seq_length,
        )  # fmt: skip


def template_options(config: TrainingConfig) -> dict[str, Any]:
    """What the chat template is told beside the messages."""
    thinking = config.grpo_enable_thinking
    return {} if thinking is None else {"enable_thinking": thinking}
