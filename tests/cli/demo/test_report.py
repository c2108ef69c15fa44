"""What is said at the end follows from the numbers, whoever wins."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from openweights.cli.demo.evaluation import Answer
from openweights.cli.demo.figure import draw
from openweights.cli.demo.report import reading, table
from openweights.cli.demo.study import Outcome, Plan, Study, methods


def _answers(lines: float, right: float) -> list[Answer]:
    """A hundred, of which so many are a ledger line, and so many right."""
    said = ["Oslo: 2 red pens." if n < round(100 * lines) else "?" for n in range(100)]
    return [Answer("order", text, float(n < round(100 * right))) for n, text in enumerate(said)]


def make_study(correct: tuple[float, float, float], kl: tuple[float, float, float]) -> Study:
    """A study with these results of SFT, reverse and forward KL."""
    study = Study(
        model="tiny",
        plan=Plan(),
        rows=192,
        gate=(0.0, 0.94),
        base=_answers(0.02, 0.0),
    )
    for method, right, moved in zip(methods(Plan()), correct, kl, strict=True):
        metrics = [{"step": step, "loss": 1 / step, "agreement": 0.9} for step in (1, 2, 3)]
        answers = _answers(min(1.0, right + 0.1), right)
        study.outcomes.append(Outcome(method, moved, 61.4, answers, metrics))
    return study


@pytest.mark.parametrize(
    ("correct", "kl", "expected"),
    [
        (
            (0.9, 0.5, 0.9),
            (0.4, 0.1, 0.2),
            "SFT and SDFT, forward KL answered most held-out orders correctly (0.90); on "
            "everyday prompts SDFT, reverse KL stayed closest to the base model (0.100 nats), SFT "
            "moved furthest (0.400, 4.0 times as far).",
        ),
        (
            (1.0, 1.0, 1.0),
            (0.1, 0.2, 0.3),
            "All methods answer 1.00 of the held-out orders correctly; on everyday prompts "
            "SFT stayed closest to the base model (0.100 nats), SDFT, forward KL moved furthest "
            "(0.300, 3.0 times as far).",
        ),
    ],
)
def test_reading_names_the_winners(
    correct: tuple[float, float, float], kl: tuple[float, float, float], expected: str
) -> None:
    assert reading(make_study(correct, kl)) == expected


def test_reading_says_when_nothing_was_learnt() -> None:
    text = reading(make_study((0.0, 0.0, 0.0), (0.0, 0.0, 0.1)))
    assert text.startswith("No method learnt the skill (0.00 correct, as the base model)")


def test_table_has_the_gate_the_base_and_every_method() -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(table(make_study((0.9, 0.5, 0.8), (0.4, 0.1, 0.2))))
    rows = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    assert cells == {
        "base, 16 training orders": ["", "0.00", "0", ""],
        "… with the demonstration": ["", "0.94", "", ""],
        "base, 64 held-out orders": ["0.02", "0.00", "0", ""],
        "SFT": ["1.00", "0.90", "0.400", "61"],
        "SDFT, reverse KL": ["0.60", "0.50", "0.100", "61"],
        "SDFT, forward KL": ["0.90", "0.80", "0.200", "61"],
    }


def test_figure_is_drawn_without_agreement_of_any_method(tmp_path: Path) -> None:
    study = make_study((0.9, 0.5, 0.8), (0.4, 0.1, 0.2))
    for outcome in study.outcomes:
        for row in outcome.metrics:
            del row["agreement"]
    draw(study, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000
