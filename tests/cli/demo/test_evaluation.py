"""What is read from an evaluation's answers, a gate's event and a training's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openweights.cli.demo.evaluation import (
    Answer,
    Score,
    gate_shares,
    last_kl,
    read_answers,
    score,
)
from openweights.cli.demo.exact import exact

SAID = [
    " Porto: 0 grey hats.\n",  # right
    "Porto: 7 grey hats.",  # a ledger line, but the wrong one
    "The order is Porto: 2 grey hats.",  # more than the line
    "Porto: 3 grey hats",  # without its full stop
]


def test_score_counts_format_and_exact_answers() -> None:
    right = exact(SAID, [f"Porto: {n} grey hats." for n in range(4)])
    answers = [Answer("order", said, one) for said, one in zip(SAID, right, strict=True)]
    assert score(answers) == Score(format=0.5, correct=0.25)


def test_answers_are_those_of_the_file(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "order"}]
    row = {"messages": asked, "completion": "said", "score": 1.0, "id": 0, "note": None}
    path = tmp_path / "exact.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_answers(path) == [Answer("order", "said", 1.0)]


@pytest.mark.parametrize(
    ("placement", "repeats", "shown"),
    [("template", 1, 0.1), ("turns", 1, 0.2), ("turns", 2, 0.3)],
)
def test_gate_is_of_the_chosen_showing(placement: str, repeats: int, shown: float) -> None:
    figures = {"student": 0.0, "template": 0.1, "turns": 0.2, "turns_2": 0.3}
    event: dict[str, object] = {"placement": placement, "repeats": repeats}
    for name, value in figures.items():
        event[f"{name}_exact"] = value
    assert gate_shares(event) == (0.0, shown)


def test_kl_is_the_last_of_all_rows() -> None:
    rows = [{"step": 0, "kl_to_base": 0.0}, {"step": 2, "kl_to_base": 0.2}, {"step": 2, "loss": 1}]
    assert last_kl(rows) == 0.2
