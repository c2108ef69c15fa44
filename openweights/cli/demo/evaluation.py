"""What the demo's jobs have measured, read from what they left behind.

Answers are greedy, and a job's id is a hash of what it does: a second demo finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openweights.jobs.unsloth.config.demonstrations import Showing

LEDGER_LINE = re.compile(r"[A-Z][a-z]+: \d+ [a-z]+ [a-z]+\.")


class Score(NamedTuple):
    """Shares of answers: those that are a ledger line, and those that are the right one."""

    format: float
    correct: float


class Answer(NamedTuple):
    """What a model said to an order, and what that was worth."""

    order: str
    said: str
    correct: float


def read_answers(path: Path) -> list[Answer]:
    """Those of an evaluation, from the file that it leaves of a model."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Answer(row["messages"][-1]["content"], row["completion"], row["score"]) for row in rows]


def score(answers: Sequence[Answer]) -> Score:
    """How many have the format, and how many are the demonstration itself."""
    lines = sum(bool(LEDGER_LINE.fullmatch(answer.said.strip())) for answer in answers)
    return Score(lines / len(answers), sum(answer.correct for answer in answers) / len(answers))


def gate_shares(event: Mapping[str, Any]) -> tuple[float, float]:
    """Of a job's teacher gate the share of right answers: of the model without the demonstration,
    and with it in the place that the gate has chosen.
    """
    shown = Showing(event["placement"], event["repeats"]).name
    return event["student_exact"], event[f"{shown}_exact"]


def last_kl(rows: Iterable[Mapping[str, Any]]) -> float:
    """KL(base || model) on everyday prompts, nats per token, as a training ended with it.

    Args:
        rows: Of `job.metrics`.
    """
    return [float(row["kl_to_base"]) for row in rows if "kl_to_base" in row][-1]
