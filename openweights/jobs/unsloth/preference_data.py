"""Rows of a `preference` file -> tokens of chosen and rejected answers, and their batches.

Both conversations are rendered as for SFT, the prompt with the whole answer, however many messages
it has. What counts is what the assistant says in the answer, with the end token of each turn.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.rows import Row, named_row, preference_messages
from openweights.jobs.unsloth.data import Encoded, encode_pieces
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.template import Message, assistant_messages, rendered_spans
from openweights.models.tokens import IGNORED, Collator

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


def encode_answer(
    prompt: Sequence[Message],
    answer: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[str],
) -> Encoded:
    """Prompt and answer as tokens; labels where the assistant speaks in the answer.

    Raises:
        ValueError: The template refuses the conversation, or hides the answer.
    """
    messages = [*prompt, *answer]
    wanted = [index for index in assistant_messages(messages) if index >= len(prompt)]
    text, spans = rendered_spans(messages, wanted, tokenizer, ends)
    return encode_pieces(text, [(span.start, span.end, 1.0) for span in spans], tokenizer)


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
        ends: Ids of the end tokens (`model.eos_token_ids`).
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in ends]
    pairs: list[dict[str, list[int]]] = []
    for number, row in enumerate(rows, start=1):
        with named_row(name, number):
            prompt, *answers = preference_messages(row)
            encoded = [encode_answer(prompt, answer, tokenizer, texts) for answer in answers]
        pairs.append(_columns(*encoded))
    limit = config.max_seq_length
    cut = [{column: values[:limit] for column, values in pair.items()} for pair in pairs]
    kept = [pair for pair in cut if _is_comparable(pair)]
    _report(name, pairs, cut, kept, limit)
    return kept


def _columns(chosen: Encoded, rejected: Encoded) -> dict[str, list[int]]:
    return {
        f"{side}_{column}": getattr(tokens, column)
        for side, tokens in zip(SIDES, (chosen, rejected), strict=True)
        for column in ("input_ids", "labels")
    }


def _report(
    name: str, pairs: Sequence[Any], cut: Sequence[Any], kept: Sequence[Any], limit: int
) -> None:
    if not kept:
        raise DatasetError(
            f"{name}: nothing to compare is left of any row within max_seq_length={limit}; raise it"
        )
    logger.info("%s: %d pairs", name, len(kept))
    shortened = sum(whole != part for whole, part in zip(pairs, cut, strict=True))
    if dropped := len(pairs) - len(kept):
        logger.warning("%s: %d pairs with nothing to compare were dropped", name, dropped)
    if shortened:
        logger.warning(
            "%s: %d pairs are longer than max_seq_length=%d and lost their end",
            name,
            shortened,
            limit,
        )


def _is_comparable(pair: Mapping[str, list[int]]) -> bool:
    labels = [pair[f"{side}_labels"] for side in SIDES]
    answered = all(any(label != IGNORED for label in side) for side in labels)
    return answered and pair["chosen_input_ids"] != pair["rejected_input_ids"]


@dataclass(slots=True)
class PreferenceCollator:
    """Pairs -> one batch of shape (2B, T), padded on the right: all chosen, then all rejected.

    `item_counts` of shape (B,) says that each pair is one item.
    """

    pad_token_id: int

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [
            {name: pair[f"{side}_{name}"] for name in ("input_ids", "labels")}
            for side in SIDES
            for pair in pairs
        ]
        return Collator(self.pad_token_id)(rows) | {"item_counts": torch.ones(len(pairs))}
