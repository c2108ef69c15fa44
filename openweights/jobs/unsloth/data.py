"""Rows of a dataset as a trainer takes them: those that can be used. What becomes of the others is
told in the log, and how they become tokens in `config/encoding.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.encoding import Encoded, EncodedRows, Reader
from openweights.jobs.unsloth.config.examples import sft_reader
from openweights.jobs.unsloth.config.rows import Row, is_weighted
from openweights.jobs.unsloth.token_table import Example, TokenTable
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import IGNORED, eos_token_ids

T = TypeVar("T")
Encode = Callable[[Row], tuple[Encoded, Iterable[str]]]

logger = logging.getLogger(__name__)


def usable_rows(rows: Iterable[Row], reader: Reader[T], *, name: str) -> Iterator[tuple[int, T]]:
    """The indices of rows that can be used, each with what the reader makes of it; behind the last
    one the rest is told of.

    Args:
        name: What the rows are called in messages.

    Raises:
        DatasetError: Rows cannot be used, each named by its line; or none is left.
    """
    read = EncodedRows[T](name, reader)
    numbered = ((getattr(row, "line", number), row) for number, row in enumerate(rows, start=1))
    for _, encoded in read.encoded(numbered):
        yield read.given - 1, encoded
    read.refuse_if_empty()
    logger.info("%s: %d rows, of up to %d tokens", name, read.kept, read.longest)
    for warning in read.warnings():
        logger.warning("%s", warning)


class LearnedRows(TokenTable):
    """Rows that are learned: `input_ids` and `labels`, and `weights` once a row has some.

    Attributes:
        is_weighted: Whether one has, be it kept or not.
        texts: How many are plain text.
    """

    def __init__(self) -> None:
        super().__init__("input_ids", "labels")
        self.is_weighted = False
        self.texts = 0

    def noting(self, encode: Encode) -> Encode:
        """`encode`, which tells the table of each row that can be read."""

        def noted(row: Row) -> tuple[Encoded, Iterable[str]]:
            read = encode(row)
            self.texts += "messages" not in row
            if not self.is_weighted and is_weighted(row):
                self.is_weighted = True
                self.add_weights()
            return read

        return noted

    def add_weights(self) -> None:
        """Have the column, if that is not there: of rows without weights it says what labels do."""
        if "weights" not in self.columns:
            self.add_reals("weights", "labels", lambda label: float(label != IGNORED))

    def for_training(self, weighted: bool) -> Dataset:
        """As a dataset, to which nothing can be added.

        Args:
            weighted: Whether rows have `weights`, too.
        """
        if not weighted:
            return self.dataset("input_ids", "labels")
        self.add_weights()
        return self.dataset("input_ids", "labels", "weights")


def learned_rows(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
) -> LearnedRows:
    """Rows for the trainer, as `sft_reader` reads them.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`); None for the tokenizer's only.
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    reader = sft_reader(config, tokenizer, end_texts(tokenizer, ends))
    table = LearnedRows()
    reader = replace(reader, encode=table.noting(reader.encode))
    for _, encoded in usable_rows(rows, reader, name=name):
        table.append(
            {
                "input_ids": encoded.input_ids,
                "labels": encoded.labels,
                "weights": encoded.weights,
            }
        )
    tokens = table.size("labels")
    learned = tokens - table.count("labels", IGNORED)
    logger.info("%s: %d tokens, %d of them learned", name, tokens, learned)
    if table.texts:
        logger.info("%s: %d rows are plain text and are learned as a whole", name, table.texts)
    return table


def sft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
    with_weights: bool = False,
) -> list[Example]:
    """`learned_rows` one by one, where they are few: `input_ids` and `labels`.

    Args:
        with_weights: Give each row `weights`, too.
    """
    table = learned_rows(config, tokenizer, rows, ends=ends, name=name)
    table.add_weights()
    columns = ["input_ids", "labels", *(["weights"] if with_weights else [])]
    return [{column: row[column] for column in columns} for row in table]


def end_texts(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] | None = None) -> list[str]:
    """Texts of the tokens that end a turn."""
    ids = eos_token_ids(None, tokenizer) if ends is None else ends
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
