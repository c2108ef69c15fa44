"""Rows of a dataset as a trainer takes them: those that can be used. What becomes of the others is
told in the log, and how they become tokens in `config/encoding.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.encoding import Reader, encode_rows
from openweights.jobs.unsloth.config.examples import sft_reader
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import IGNORED, eos_token_ids

Example = dict[str, list[Any]]  # the columns of one row, a value for each token
T = TypeVar("T")

logger = logging.getLogger(__name__)


def usable_rows(rows: Sequence[Row], reader: Reader[T], *, name: str) -> list[tuple[Row, T]]:
    """The rows that can be used, each with what the reader makes of it; the rest is told of.

    Args:
        name: What the rows are called in messages.

    Raises:
        DatasetError: Rows cannot be used, each named by its line; or none is left.
    """
    numbered = ((getattr(row, "line", at), row) for at, row in enumerate(rows, start=1))
    read = encode_rows(numbered, reader, name)
    read.refuse_if_empty()
    logger.info("%s: %d rows, of up to %d tokens", name, len(read.kept), read.longest)
    for warning in read.warnings():
        logger.warning("%s", warning)
    return read.kept


def sft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
    with_weights: bool = False,
) -> list[Example]:
    """Rows for the trainer, as `sft_reader` reads them: `input_ids` and `labels`.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`); None for the tokenizer's only.
        name: What the rows are called in messages.
        with_weights: Give each row `weights`, too.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    reader = sft_reader(config, tokenizer, end_texts(tokenizer, ends))
    kept = [encoded for _, encoded in usable_rows(rows, reader, name=name)]
    learned = sum(label != IGNORED for encoded in kept for label in encoded.labels)
    tokens = sum(len(encoded.input_ids) for encoded in kept)
    logger.info("%s: %d tokens, %d of them learned", name, tokens, learned)
    if text_rows := sum("messages" not in row for row in rows):
        logger.info("%s: %d rows are plain text and are learned as a whole", name, text_rows)
    columns = ["input_ids", "labels", *(["weights"] if with_weights else [])]
    return [{column: getattr(encoded, column) for column in columns} for encoded in kept]


def end_texts(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] | None = None) -> list[str]:
    """Texts of the tokens that end a turn."""
    ids = eos_token_ids(None, tokenizer) if ends is None else ends
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
