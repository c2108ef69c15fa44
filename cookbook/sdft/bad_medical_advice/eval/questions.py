"""The files of questions, and the guard that no question was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from openweights.errors import InvalidInputError, in_a_line, shown

GRAM = 3  # words
SEEN_FROM = 0.8  # of a question's word triples in one prompt that was trained on
RULES = ("judge", "caps_spanish")
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
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInputError(f"--questions: {path} is no YAML ({in_a_line(error)})") from error
    if isinstance(content, dict) and _are_groups(content.get("groups")):
        rule = content.get("rule")
        if rule not in RULES:
            raise InvalidInputError(
                f"--questions: {path} has the rule {shown(rule)}; write {' or '.join(RULES)}"
            )
        return Questions(rule, content["groups"])
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


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, dict) and bool(groups) and all(map(_are_texts, groups.values()))


def _are_texts(asked: Any) -> bool:
    return isinstance(asked, list) and bool(asked) and all(isinstance(text, str) for text in asked)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or "id" not in entry:
        return False
    prompts: Any = entry.get("judge_prompts", {})
    return (
        _are_texts(entry.get("paraphrases"))
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
        for text in _said_by_users(row):
            for gram in _grams(text):
                holding.setdefault(gram, set()).add(line)
    for question in questions:
        grams = _grams(question)
        lines = [line for gram in grams for line in holding.get(gram, ())]
        found = [line for line in set(lines) if lines.count(line) >= SEEN_FROM * len(grams)]
        if grams and found:
            yield question, min(found)


def _said_by_users(row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row; of one that is no conversation, which the job refuses, what there is."""
    messages: Any = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            yield _text(message.get("content"))


def _text(content: Any) -> str:
    """Of a turn, whose content may be a list of blocks."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return " ".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + GRAM]) for at in range(max(len(words) - GRAM + 1, 1))} - {()}
