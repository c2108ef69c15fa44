"""Rows -> tokens, the same way for every loss: encoded, cut or dropped where they are too long,
refused by line, and reported.

Labels are made here and nowhere else: -100 for what is read, the token itself for what is learned.
What that is says `config/rendering.py`; a token across two blocks belongs to the first. The first
token of a sequence is never a label: nothing predicts it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from openweights import progress
from openweights.client.messages import Problems
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.rendering import (
    LearnedText,
    TrainOn,
    plain_text_ids,
    read_text,
    row_text,
)
from openweights.jobs.unsloth.config.rows import Row, is_weighted
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import IGNORED, eos_token_ids

Example = dict[str, list[Any]]  # the columns of one row, a value for each token
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Encoded:
    """One row for the trainer.

    Attributes:
        labels: -100 where nothing is learned, which is so where the weight is 0.
        weights: Of each token.
        offsets: Of each token, its first character and the one behind it; empty for plain text.
        notes: What is worth saying once for a whole dataset.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    offsets: list[tuple[int, int]]
    notes: frozenset[str] = frozenset()

    def cut(self, limit: int) -> None:
        """Leave the first tokens."""
        for column in (self.input_ids, self.labels, self.weights, self.offsets):
            del column[limit:]


# ---- all rows of a dataset -----------------------------------------------------------------------


@dataclass(frozen=True)
class Fitting(Generic[T]):
    """How long encoded rows may be, and what happens to longer ones.

    Attributes:
        limit: In tokens; None for no limit.
        length: Of an encoded row.
        cut: Leaves the first so many tokens; None where a longer row is dropped.
        is_useful: Whether a row is kept, after it was cut.
        useless: What a row lacks that is not, in words.
        room: What the limit leaves free of `max_seq_length`.
    """

    limit: int | None
    length: Callable[[T], int]
    cut: Callable[[T, int], None] | None = None
    is_useful: Callable[[T], bool] = lambda _: True
    useless: str = ""
    room: int = 0


@dataclass(slots=True)
class _Counts:
    """What has become of the rows of a dataset.

    Attributes:
        given: All of them.
        kept: Those that can be used.
        longer: Those that have more tokens than the limit.
        useless: Those that fit, and were left out all the same.
        longest: Tokens of the longest row.
    """

    given: int
    kept: int = 0
    longer: int = 0
    useless: int = 0
    longest: int = 0


def encode_rows(
    rows: Sequence[Row],
    encode: Callable[[Row], tuple[T, Iterable[str]]],
    fitting: Fitting[T],
    *,
    name: str,
) -> list[tuple[Row, T]]:
    """The rows that can be used, each with what `encode` makes of it; the rest is counted.

    Args:
        encode: Gives the encoded row, and notes that are worth saying once.
        name: What the rows are called in messages.

    Raises:
        DatasetError: Rows cannot be used, each named by its line; or none is left.
    """
    problems, notes, counts = Problems(name), Counter[str](), _Counts(len(rows))
    kept: list[tuple[Row, T]] = []
    for number, row in enumerate(rows, start=1):
        progress.advanced()
        try:
            encoded, said = encode(row)
        except ConfigError:
            raise
        except ValueError as error:
            problems.add_error(getattr(row, "line", number), error)
            continue
        notes.update(said)
        length = fitting.length(encoded)
        counts.longest = max(counts.longest, length)
        if fitting.limit is not None and length > fitting.limit:
            counts.longer += 1
            if fitting.cut is None:
                continue
            fitting.cut(encoded, fitting.limit)
        if fitting.is_useful(encoded):
            kept.append((row, encoded))
        else:
            counts.useless += 1
    problems.raise_if_any(rows=len(rows))
    counts.kept = len(kept)
    _report(fitting, name, counts)
    for note, count in notes.items():
        logger.warning("%s: %s (%d of %d rows)", name, note, count, len(rows))
    return kept


def _report(fitting: Fitting[Any], name: str, counts: _Counts) -> None:
    """Tell what has become of the rows; raises DatasetError where none is left."""
    limit, longest = fitting.limit, counts.longest
    beside = f" beside {fitting.room} tokens for a completion" if fitting.room else ""
    if not counts.kept:
        why = fitting.useless if fitting.cut else "no row fits"
        raise DatasetError(
            f"{name}: {why}: rows have up to {longest} tokens, and max_seq_length leaves {limit}"
            f"{beside}; raise max_seq_length to {longest + fitting.room}"
            if counts.longer
            else f"{name}: {why}; correct the rows"
        )
    logger.info("%s: %d rows, of up to %d tokens", name, counts.kept, longest)
    if counts.longer and fitting.cut is None:
        logger.warning(
            "%s: %d of %d rows dropped: they exceed the %d tokens that max_seq_length leaves%s; "
            "the longest has %d",
            *(name, counts.given - counts.kept, counts.given, limit, beside, longest),
        )
    elif counts.longer:
        cut = "%s: %d rows are longer than max_seq_length=%d and lost their end"
        logger.warning(cut, name, counts.longer, limit)
    if counts.useless:
        logger.warning("%s: %d rows dropped: %s", name, counts.useless, fitting.useless)


# ---- one row -------------------------------------------------------------------------------------


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn, ends: Sequence[str]
) -> Encoded:
    """Tokens, labels and weights of a row, of whatever length.

    A `text` row is learned as a whole and closed with the end token.

    Raises:
        ValueError: The row cannot be rendered as it says.
    """
    if "messages" not in row:
        return _encode_text(row, tokenizer)
    return encode_text(row_text(row, tokenizer, train_on=train_on, ends=ends), tokenizer)


def _encode_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids, notes = plain_text_ids(row, tokenizer)
    return Encoded(ids, [IGNORED, *ids[1:]], [0.0, *[1.0] * (len(ids) - 1)], [], notes)


def encode_text(learned: LearnedText, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens of a rendered text; each has the weight of the first piece that it touches."""
    pieces = learned.pieces
    ids, offsets, notes = read_text(learned, tokenizer)
    weights = [0.0 if at is None else pieces[at][2] for at in pieces_of_tokens(offsets, pieces)]
    weights[0] = 0.0
    labels = [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]
    return Encoded(ids, labels, weights, offsets, notes)


def pieces_of_tokens(
    offsets: Sequence[tuple[int, int]], pieces: Sequence[Sequence[float]]
) -> list[int | None]:
    """For each token the index of the first piece that it touches, or None."""
    found: list[int | None] = []
    remaining = [index for index, piece in enumerate(pieces) if piece[0] < piece[1]]
    for start, stop in offsets:
        while remaining and pieces[remaining[0]][1] <= start:
            remaining.pop(0)
        touches = bool(remaining) and pieces[remaining[0]][0] < stop and start < stop
        found.append(remaining[0] if touches else None)
    return found


# ---- rows of sft ---------------------------------------------------------------------------------


def sft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
    with_weights: bool = False,
) -> list[Example]:
    """Rows for the trainer: `input_ids` and `labels`, at most `max_seq_length` tokens each.

    A longer row loses its end; when nothing to learn is left of it, it is dropped, except for a row
    whose weights say so. Both are counted in the log.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`); None for the tokenizer's only.
        name: What the rows are called in messages.
        with_weights: Give each row `weights`, too.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    texts = end_texts(tokenizer, ends)

    def encode(row: Row) -> tuple[tuple[Encoded, bool], Iterable[str]]:
        encoded = encode_row(row, tokenizer, train_on=config.train_on, ends=texts)
        says_nothing = all(label == IGNORED for label in encoded.labels)
        return (encoded, says_nothing and is_weighted(row)), encoded.notes

    fitting = Fitting[tuple[Encoded, bool]](
        config.max_seq_length,
        length=lambda pair: len(pair[0].input_ids),
        cut=lambda pair, limit: pair[0].cut(limit),
        is_useful=lambda pair: pair[1] or any(label != IGNORED for label in pair[0].labels),
        useless="nothing to learn is left of any row",
    )
    kept = [encoded for _, (encoded, _) in encode_rows(rows, encode, fitting, name=name)]
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
