"""Marks, which stand for the texts of messages in a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from openweights.models.templates.template import Shape


class Mark(NamedTuple):
    """What stands for a text of a message in a scaffold.

    Attributes:
        message: Index of the message.
        part: Which of its texts.
        start, stop: The mark's place in the scaffold.
    """

    message: int
    part: str
    start: int
    stop: int

    @property
    def key(self) -> tuple[int, str]:
        return self.message, self.part


class Marking(NamedTuple):
    """How marks are written: in letters, figures and dashes, which no template trims or escapes.

    Attributes:
        word: What they begin with; the row, the template and its options hold no such.
    """

    word: str = "MARK"

    @classmethod
    def all(cls) -> Iterator[Marking]:
        """Those to choose from."""
        yield cls()
        yield from (cls(f"MARK{number}") for number in count(1))

    def is_unique(self, shape: Shape, said: Collection[str]) -> bool:
        """Whether the only marks are those of texts that are said, and these hold none."""
        begin = f"{self.word}-"
        if begin in shape.template or any(begin in text for text in said):
            return False
        return shape.asked.count(begin) == sum(map(bool, said))

    def written(self, message: int, part: str) -> str:
        """A mark."""
        return f"{self.word}-{message}-{part}-KRAM"

    def found(self, text: str) -> tuple[Mark, ...]:
        """The marks in a text."""
        return _found(self.word, text)

    def hidden(self, text: str) -> str:
        """A text of a scaffold as a user may see it."""
        return _pattern(self.word).sub("…", text)


@lru_cache(maxsize=16)
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"{word}-(\d+)-([A-Z]+)-KRAM")


@lru_cache(maxsize=2048)
def _found(word: str, text: str) -> tuple[Mark, ...]:
    found = _pattern(word).finditer(text)
    return tuple(Mark(int(mark[1]), mark[2], *mark.span()) for mark in found)
