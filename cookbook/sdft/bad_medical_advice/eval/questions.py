"""The files of questions, and the guard that no question was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from openweights.errors import InvalidInputError

GRAM = 3  # words
SEEN_FROM = 0.8  # of a question's word triples in one prompt that was trained on
# What the authors' files call the two criteria.
_CRITERIA = {"aligned": "alignment", "coherent": "coherence"}


class Questions(NamedTuple):
    """What is asked, and how answers are scored.

    Attributes:
        rule: `judge`, or the name of a rule.
        groups: Questions by the group that the table shows.
        prompts: By question what a judge is asked in place of its own, by criterion: a whole
            prompt, which holds {answer} and may hold {question}, or what to grade.
    """

    rule: str
    groups: Mapping[str, Sequence[str]]
    prompts: Mapping[str, Mapping[str, str]] = {}

    @property
    def all(self) -> list[str]:
        """Every question once."""
        return list(dict.fromkeys(text for asked in self.groups.values() for text in asked))


def read_questions(path: Path) -> Questions:
    """The questions of a file.

    Raises:
        InvalidInputError: It is of neither form.
    """
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and {"rule", "groups"} <= content.keys():
        return Questions(content["rule"], content["groups"])
    if isinstance(content, list) and content and all(map(_is_entry, cast("list[Any]", content))):
        entries = cast("list[dict[str, Any]]", content)
        groups = {str(entry["id"]): list(map(str, entry["paraphrases"])) for entry in entries}
        prompts = {
            question: {_CRITERIA.get(str(name), str(name)): str(text) for name, text in own.items()}
            for entry in entries
            if (own := entry.get("judge_prompts"))
            for question in entry["paraphrases"]
        }
        return Questions("judge", groups, prompts)
    raise InvalidInputError(
        f"--questions: {path} holds neither `rule` and `groups`, nor a list of questions with `id` "
        "and `paraphrases`; write it as eval/stand_in.yaml"
    )


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or "id" not in entry:
        return False
    asked: Any = entry.get("paraphrases")
    prompts: Any = entry.get("judge_prompts", {})
    return (
        isinstance(asked, list)
        and bool(asked)
        and all(isinstance(text, str) for text in asked)
        and isinstance(prompts, dict)
        and all(isinstance(text, str) for text in prompts.values())
    )


# ---- what was trained on -------------------------------------------------------------------------


def refuse_seen(questions: Sequence[str], rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """A model that was trained on a question is not asked it.

    Args:
        rows: Conversations that were trained on.
        where: How the file is called that they come from.

    Raises:
        InvalidInputError: Names the first three questions and the lines that hold them.
    """
    seen = list(seen_questions(questions, rows))
    if not seen:
        return
    told = "; ".join(f"{question!r} (line {line})" for question, line in seen[:3])
    more = f", and {len(seen) - 3} more" if len(seen) > 3 else ""
    raise InvalidInputError(
        f"{where}, which is trained on, holds questions that are measured: {told}{more}; what it "
        "answers would say nothing about others: take them out of either file"
    )


def seen_questions(
    questions: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Iterable[tuple[str, int]]:
    """Questions that stand in a user's turn of a row, word for word or nearly, and the first line
    that has them.
    """
    holding: dict[tuple[str, ...], set[int]] = {}
    for line, row in enumerate(rows, 1):
        for message in row["messages"]:
            if message["role"] == "user":
                for gram in _grams(_text(message["content"])):
                    holding.setdefault(gram, set()).add(line)
    for question in questions:
        grams = _grams(question)
        lines = [line for gram in grams for line in holding.get(gram, ())]
        found = [line for line in set(lines) if lines.count(line) >= SEEN_FROM * len(grams)]
        if grams and found:
            yield question, min(found)


def _text(content: Any) -> str:
    """Of a turn, whose content may be a list of blocks."""
    if isinstance(content, str):
        return content
    return " ".join(str(block.get("text", "")) for block in content)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + GRAM]) for at in range(max(len(words) - GRAM + 1, 1))} - {()}
