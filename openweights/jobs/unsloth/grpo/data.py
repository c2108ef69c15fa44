"""Rows of GRPO: prompts for the trainer, and the rows themselves for the reward functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.examples import Prompt, grpo_reader
from openweights.jobs.unsloth.config.grpo_fields import GOLD
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import usable_rows
from openweights.jobs.unsloth.validate import TrainingConfig


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
    used = usable_rows(rows, grpo_reader(config, tokenizer), name=name)
    kept = [(rows[at], prompt) for at, prompt in used]
    prompts = [prompt for _, prompt in kept]
    plain = [[{k: m[k] for k in ("role", "content")} for m in p.messages] for p in prompts]
    columns = {"prompt": plain, "row": list(range(first, first + len(kept)))}
    return GRPORows(
        prompts,
        Dataset.from_dict(columns),
        [{**{k: v for k, v in row.items() if k != "messages"}, GOLD: p.gold} for row, p in kept],
    )
