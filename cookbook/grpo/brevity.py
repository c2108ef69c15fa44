"""A reward of one's own. It travels with the job and is called where the model trains.

GRPO calls it by keyword with the completions of a step, and with those of the rows' columns that it
has parameters for; each value is a number, or None where no reward can be given.
"""

from __future__ import annotations

import re

LEDGER_LINE = re.compile(r"[A-Z][a-z]+: \d+ [a-z]+ [a-z]+\.")


def score(completions: list[str], gold_response: list[str]) -> list[float]:
    """Share of the gold line's words that the answer has, up to 1; half as much again for a ledger
    line; less for each word too many.
    """
    return [_score(answer, gold) for answer, gold in zip(completions, gold_response, strict=True)]


def _score(answer: str, gold: str) -> float:
    said, wanted = _words(answer), _words(gold)
    found = len(set(said) & set(wanted)) / len(set(wanted))
    bonus = 0.5 if LEDGER_LINE.fullmatch(answer.strip()) else 0.0
    return found + bonus - 0.05 * max(0, len(said) - len(wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
