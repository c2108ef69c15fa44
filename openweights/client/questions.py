"""Rows of a `multiple_choice` file: `{"question": …, "choices": […], "answer": …}`.

`answer` is the right choice itself, or its position, from 0. Used when a file is uploaded, and
where its questions are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

MIN_CHOICES = 2


@dataclass(frozen=True, slots=True)
class Question:
    """A question with several answers.

    Attributes:
        text: What the user asks.
        choices: The answers, each with text of its own.
        answer: Position of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


def parse_question(row: Mapping[str, Any]) -> Question:
    """The question in a row; other columns are free.

    Raises:
        ValueError: `field: what is wrong; what to do`.
    """
    text, choices = row.get("question"), _choices(row.get("choices"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("question: is missing or no text; give the question as a string")
    return Question(text, choices, _position(row.get("answer"), choices))


def _choices(value: object) -> tuple[str, ...]:
    given = cast("Sequence[object]", value) if isinstance(value, list | tuple) else ()
    texts = tuple(choice for choice in given if isinstance(choice, str) and choice.strip())
    if len(texts) < MIN_CHOICES or len(texts) != len(given):
        raise ValueError("choices: must be a list of two or more texts; correct it")
    if len(set(texts)) < len(texts):
        raise ValueError("choices: holds the same text twice; remove one of the two")
    return texts


def _position(value: object, choices: Sequence[str]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"answer: is neither one of the choices nor a position from 0 to {len(choices) - 1}; "
        "correct it"
    )
