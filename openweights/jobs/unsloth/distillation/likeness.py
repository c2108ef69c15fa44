"""How alike two answers are, to the teacher gate: in what they say, and in their format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Words and signs; a letter of a script without spaces is a word of its own.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


class Answer(NamedTuple):
    """An answer, and whether it ended by itself: one that was cut has no end to speak of."""

    text: str
    ended: bool = True


def rouge_l_with_signs(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words and signs (C.-Y. Lin, 2004), 0 to 1.

    Signs count, unlike in other ROUGE-L, because formats are made of them; letters of scripts
    without spaces are words of their own.
    """
    said, wanted = _words(answer), _words(gold)
    if not said or not wanted:
        return float(said == wanted)
    return 2 * _common_length(said, wanted) / (len(said) + len(wanted))


def answer_format(answer: str) -> tuple[str, str, bool]:
    """The format of an answer, as far as it shows at its edges: how it begins, how it ends (a sign
    as itself, words as "w", numbers as "0"), and whether it has several lines.

    Two answers of one format may say different things; an explanation before a call in brackets has
    another format than the call.
    """
    words = _words(answer.strip())
    if not words:
        return "", "", False
    return _edge(words[0]), _edge(words[-1]), "\n" in answer.strip()


def same_format_share(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    """The share of pairs of answers that are of one format, of which none is that was cut."""
    return sum(_have_same_format(one, other) for one, other in pairs) / len(pairs)


def _have_same_format(one: Answer, other: Answer) -> bool:
    ended = one.ended and other.ended
    return ended and answer_format(one.text) == answer_format(other.text)


def _edge(word: str) -> str:
    return "0" if word[0].isdecimal() else "w" if word[0].isalnum() else word


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with a row of the table in the bits of a number
    (H. Hyyrö, "Bit-parallel LCS-length computation revisited", 2004).
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full  # a bit is 0 where the length grows
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()
