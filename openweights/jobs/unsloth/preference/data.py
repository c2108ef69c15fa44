"""Rows of a `preference` file -> tokens of chosen and rejected answers, and their batches.

Both conversations are rendered as for SFT, the prompt with the whole answer, however many messages
it has. What counts is what the assistant says in the answer, with the end token of each turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.rendering import answer_texts
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import Encoded, Fitting, encode_rows, encode_text, end_texts
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import IGNORED, Collator

SIDES = ("chosen", "rejected")


def preference_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    ends: Sequence[int],
    name: str = "training_file",
) -> list[dict[str, list[int]]]:
    """Pairs for the trainer: `<side>_input_ids` and `<side>_labels`, `max_seq_length` at most.

    A longer conversation loses its end. A pair with nothing to compare left is dropped: an answer
    without tokens, or two equal ones. Both are counted in the log.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`).
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    texts = end_texts(tokenizer, ends)

    def encode(row: Row) -> tuple[list[Encoded], frozenset[str]]:
        pair = [encode_text(text, tokenizer) for text in answer_texts(row, tokenizer, texts)]
        return pair, pair[0].notes | pair[1].notes

    fitting = Fitting[list[Encoded]](
        config.max_seq_length,
        length=lambda pair: max(len(encoded.input_ids) for encoded in pair),
        cut=lambda pair, limit: [encoded.cut(limit) for encoded in pair][0],
        is_useful=_is_comparable,
        useless="nothing to compare is left of any row",
    )
    pairs = [pair for _, pair in encode_rows(rows, encode, fitting, name=name)]
    return [_columns(*pair) for pair in pairs]


def _is_comparable(pair: Sequence[Encoded]) -> bool:
    answered = all(any(label != IGNORED for label in encoded.labels) for encoded in pair)
    return answered and pair[0].input_ids != pair[1].input_ids


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
