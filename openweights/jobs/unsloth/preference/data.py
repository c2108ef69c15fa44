"""Rows of a `preference` file -> tokens of chosen and rejected answers, and their batches.

Both conversations are rendered as for SFT, the prompt with the whole answer, however many messages
it has. What counts is what the assistant says in the answer, with the end token of each turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.encoding import Encoded
from openweights.jobs.unsloth.config.examples import pair_reader
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import end_texts, usable_rows
from openweights.jobs.unsloth.token_table import TokenTable
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import Collator

SIDES = ("chosen", "rejected")
COLUMNS = [f"{side}_{column}" for side in SIDES for column in ("input_ids", "labels")]


def preference_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    ends: Sequence[int],
    name: str = "training_file",
) -> TokenTable:
    """Pairs for the trainer, as `pair_reader` reads them: `<side>_input_ids` and `<side>_labels`.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`).
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    reader = pair_reader(config, tokenizer, end_texts(tokenizer, ends))
    table = TokenTable(*COLUMNS)
    for _, pair in usable_rows(rows, reader, name=name):
        table.append(_columns(*pair))
    return table


def _columns(chosen: Encoded, rejected: Encoded) -> dict[str, list[int]]:
    return {
        f"{side}_{column}": getattr(tokens, column)
        for side, tokens in zip(SIDES, (chosen, rejected), strict=True)
        for column in ("input_ids", "labels")
    }


@dataclass(slots=True)
class PreferenceCollator:
    """Pairs -> one batch of 2B rows: all chosen, then all rejected.

    Padded on the right, or `packed`; see `Collator`. `item_counts` of shape (B,) says that each
    pair is one item.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [
            {name: pair[f"{side}_{name}"] for name in ("input_ids", "labels")}
            for side in SIDES
            for pair in pairs
        ]
        return Collator(self.pad_token_id, self.packed)(rows) | {
            "item_counts": torch.ones(len(pairs))
        }
