"""Rows -> tokens, the same way for every loss: encoded, cut or dropped where they are too long,
refused by line, and counted.

It is done twice: to the first rows before a job is submitted, and to all of them by the worker.
Labels are made here and nowhere else: -100 for what is read, the token itself for what is learned.
What that is says `rendering.py`; a token across two blocks belongs to the first. The first token of
a sequence is never a label: nothing predicts it. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Generic, TypeVar

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
from openweights.json_values import texts_of
from openweights.models.reading import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

ENOUGH_TEXT = 4_000_000  # characters of rows that are only looked at: a second or two


@dataclass(slots=True)
class Encoded:
    """One row for the trainer.

    Attributes:
        labels: -100 where nothing is learned, which is so where the weight is 0.
        weights: Of each token.
        offsets: Of each token, its first character and the one behind it; empty for plain text.
        notes: What is worth saying once for a whole dataset.
        is_silent: Whether the row's weights say that nothing of it is learned.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    offsets: list[tuple[int, int]]
    notes: frozenset[str] = frozenset()
    is_silent: bool = False

    def cut(self, limit: int) -> None:
        """Leave the first tokens."""
        for column in (self.input_ids, self.labels, self.weights, self.offsets):
            del column[limit:]

    @property
    def teaches(self) -> bool:
        """Whether a token of it is learned."""
        return self.labels.count(IGNORED) < len(self.labels)

    @property
    def is_useful(self) -> bool:
        """Whether it is what it was meant to be, also where nothing was to be learned."""
        return self.is_silent or self.teaches


# ---- all rows of a dataset -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reader(Generic[T]):
    """How the rows of a dataset are read, how long they may be, and what happens to longer ones.

    Attributes:
        encode: Gives an encoded row, and notes that are worth saying once.
        length: Of an encoded row, in tokens.
        limit: In tokens; None for no limit.
        cut: Leaves the first so many tokens; None where a longer row is dropped.
        is_useful: Whether a row is kept, after it was cut.
        useless: What a row lacks that is not, in words.
        answer: The field that says how many tokens an answer to the row may have, and that number;
            for rows that are answered.
    """

    encode: Callable[[Row], tuple[T, Iterable[str]]]
    length: Callable[[T], int]
    limit: int | None = None
    cut: Callable[[T, int], None] | None = None
    is_useful: Callable[[T], bool] = lambda _: True
    useless: str = ""
    answer: tuple[str, int] | None = None

    @property
    def room(self) -> int:
        """What the limit leaves free of `max_seq_length`."""
        return self.answer[1] if self.answer and self.limit is not None else 0


@dataclass(slots=True)
class EncodedRows(Generic[T]):
    """What has become of the rows of a dataset, of which none is held.

    Attributes:
        kept: How many can be used.
        given: How many there were.
        longer: How many have more tokens than the limit.
        useless: How many fit, and were left out all the same.
        longest: Tokens of the longest row.
        text: Characters of all rows, where they are only looked at.
        notes: What is worth saying, and of how many rows.
    """

    name: str
    reader: Reader[T]
    kept: int = 0
    given: int = 0
    longer: int = 0
    useless: int = 0
    longest: int = 0
    text: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def encoded(
        self, rows: Iterable[tuple[int, Row]], enough: int | None = None
    ) -> Iterator[tuple[Row, T]]:
        """Encode each row, and count them; those that can be used, each with what is made of it.

        Args:
            rows: With their lines.
            enough: Stop behind so many rows, or `ENOUGH_TEXT`, or else behind the first that can
                be used.

        Raises:
            DatasetError: Rows cannot be used, each named by its line; behind the last one.
        """
        problems = Problems(self.name)
        for line, row in rows:
            if enough is not None:
                has_enough = self.given >= enough or self.text >= ENOUGH_TEXT
                if has_enough and (self.kept or problems.count):
                    break
                self.text += text_size(row)
            self.given += 1
            progress.advanced()
            try:
                encoded, said = self.reader.encode(row)
            except ConfigError:
                raise
            except ValueError as error:
                problems.add_error(line, error)
                continue
            self.notes.update(said)
            if self._is_kept(encoded):
                self.kept += 1
                yield row, encoded
        problems.raise_if_any(rows=self.given)

    def _is_kept(self, encoded: T) -> bool:
        """Whether a row can be used, which is cut where it is too long."""
        reader, length = self.reader, self.reader.length(encoded)
        self.longest = max(self.longest, length)
        if reader.limit is not None and length > reader.limit:
            self.longer += 1
            if reader.cut is None:
                return False
            reader.cut(encoded, reader.limit)
        if reader.is_useful(encoded):
            return True
        self.useless += 1
        return False

    def refuse_if_empty(self, first: bool = False) -> None:
        """See that some are left.

        Args:
            first: Whether there are more rows than were read.

        Raises:
            DatasetError: None is.
        """
        if self.kept:
            return
        reader, room = self.reader, self.reader.room
        of = f"of the first {self.given:,} rows" if first else "of any row"
        why = f"{reader.useless} {of}" if reader.cut else f"no row fits{self._first(first)}"
        if not self.longer:
            raise DatasetError(f"{self.name}: {why}; correct the rows")
        raise DatasetError(
            f"{self.name}: {why}: rows have up to {self.longest} tokens, and max_seq_length leaves "
            f"{reader.limit}{self._beside}; raise max_seq_length to {self.longest + room}"
        )

    def warnings(self, first: bool = False) -> list[str]:
        """What is lost, and what is worth saying.

        Args:
            first: Whether there are more rows than were read.
        """
        said: list[str] = []
        of = self.of(first)
        dropped = self.given - self.kept
        if self.longer and self.reader.cut is None:
            said.append(
                f"{dropped:,} {of} dropped ({_share(dropped, self.given)}): they exceed the "
                f"{self.reader.limit} tokens that max_seq_length leaves{self._beside}; the longest "
                f"has {self.longest}"
            )
        elif self.longer:
            said.append(
                f"{self.longer:,} {of} ({_share(self.longer, self.given)}) are longer than "
                f"max_seq_length={self.reader.limit} and lose their end; the longest has "
                f"{self.longest} tokens"
            )
        if self.useless:
            said.append(f"{self.useless:,} {of} dropped: {self.reader.useless}")
        said += [f"{note} ({count:,} {of})" for note, count in self.notes.items()]
        return [f"{self.name}: {text}" for text in said]

    def of(self, first: bool) -> str:
        """Of how many rows something is said."""
        return f"of {'the first ' if first else ''}{self.given:,} rows"

    @property
    def _beside(self) -> str:
        room = self.reader.room
        return f" beside {room} tokens for a completion" if room else ""

    def _first(self, first: bool) -> str:
        return f" of the first {self.given:,}" if first else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part * 200 >= whole else f"{part / whole:.1%}"


def text_size(row: Row) -> int:
    """Characters of all texts in a row."""
    return sum(len(text) for _, text in texts_of(row))


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
    encoded = encode_text(row_text(row, tokenizer, train_on=train_on, ends=ends), tokenizer)
    encoded.is_silent = not encoded.teaches and is_weighted(row)
    return encoded


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
    waiting = ((at, *piece[:2]) for at, piece in enumerate(pieces) if piece[0] < piece[1])
    behind_all: tuple[int | None, float, float] = (None, inf, inf)
    at, first, last = next(waiting, behind_all)
    for start, stop in offsets:
        while last <= start:
            at, first, last = next(waiting, behind_all)
        found.append(at if first < stop and start < stop else None)
    return found
