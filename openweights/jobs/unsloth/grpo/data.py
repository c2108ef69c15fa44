"""Rows of GRPO: prompts for the trainer, and the rows themselves for the reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.grpo_fields import GOLD, split_gold
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import Fitting, encode_rows
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.reading import token_ids
from openweights.models.templates.messages import Message
from openweights.models.templates.rendering import rendered_prompt


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is answered.

    Attributes:
        ids: Rendered and tokenised.
        gold: The gold response, where there is one.
    """

    messages: list[Message]
    ids: list[int]
    gold: str | None


@dataclass(frozen=True, slots=True)
class GRPORows:
    """A dataset's rows that are used.

    Attributes:
        prompts: What is answered.
        dataset: For the trainer; its `row` is an index into the prompts and rows of the run.
        rows: All columns of each but its messages, with `gold_response`.
    """

    prompts: list[Prompt]
    dataset: Dataset
    rows: list[dict[str, Any]]


def grpo_rows(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
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

    def encode(row: Row) -> tuple[Prompt, frozenset[str]]:
        messages, gold = split_gold(row)
        rendered = rendered_prompt(tokenizer, messages, tools=row.get("tools"))
        ids = token_ids(tokenizer, rendered.text)
        return Prompt(messages, ids, gold), rendered.notes

    fitting = Fitting[Prompt](
        config.max_seq_length - config.grpo_max_completion_length,
        length=lambda prompt: len(prompt.ids),
        room=config.grpo_max_completion_length,
    )
    kept = encode_rows(rows, encode, fitting, name=name)
    prompts = [prompt for _, prompt in kept]
    plain = [[{k: m[k] for k in ("role", "content")} for m in p.messages] for p in prompts]
    columns = {"prompt": plain, "row": list(range(first, first + len(kept)))}
    return GRPORows(
        prompts,
        Dataset.from_dict(columns),
        [{**{k: v for k, v in row.items() if k != "messages"}, GOLD: p.gold} for row, p in kept],
    )
