"""Draws `trajectories.png`: how each method trained, and where it ended."""

# matplotlib's own annotations are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from openweights.cli.demo.evaluation import score
from openweights.number_words import number_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from openweights.cli.demo.study import Outcome, Study

# One colour for each method in every panel, told apart also by those who see few colours.
COLORS = {"sft": "#d55e00", "reverse_kl": "#0072b2", "forward_kl": "#009e73"}
MARKERS = {"sft": "s", "reverse_kl": "o", "forward_kl": "^"}
BASE_COLOR = "#666666"


def draw(study: Study, path: Path) -> None:
    """Save the figure of a finished study to `path`."""
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    grid = figure.add_gridspec(max(len(study.outcomes), 1), 3)
    middle, right = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    figure.suptitle(
        f"{study.model} learns one skill from {study.rows} demonstrations: "
        f"{study.plan.steps} steps of {study.plan.batch_rows} rows at learning rate "
        f"{number_words(study.plan.learning_rate)}"
    )
    # Cross-entropy and either divergence are different things: each has its own axes.
    for place, outcome in enumerate(study.outcomes):
        axes = figure.add_subplot(grid[place, 0])
        _draw_metric(axes, [outcome], "loss")
        axes.set_ylabel("loss, nats", fontsize="small")
        axes.set_ylim(bottom=0)
        if place == 0:
            axes.set_title("Training loss, which is not the same thing of each", fontsize="medium")
        if place < len(study.outcomes) - 1:
            axes.set_xlabel("")
    _draw_metric(middle, study.outcomes, "agreement")
    middle.set_title("Student and teacher have the same first choice", fontsize="medium")
    middle.set_ylabel("share of completion tokens")
    middle.set_ylim(0, 1.02)
    _draw_ends(right, study)
    figure.savefig(path, dpi=130)


def _draw_metric(axes: Axes, outcomes: Sequence[Outcome], name: str) -> None:
    for outcome in outcomes:
        points = [(row["step"], row[name]) for row in outcome.metrics if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            key = outcome.method.key
            axes.plot(
                steps,
                values,
                color=COLORS[key],
                marker=MARKERS[key],
                markersize=3.5,
                label=outcome.method.label,
            )
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.get_lines():
        axes.legend(fontsize="small")


def _draw_ends(axes: Axes, study: Study) -> None:
    axes.scatter(
        [0.0], [score(study.base).correct], color=BASE_COLOR, marker="X", s=70, label="base"
    )
    for outcome in study.outcomes:
        key = outcome.method.key
        axes.scatter(
            [outcome.kl],
            [outcome.score.correct],
            color=COLORS[key],
            marker=MARKERS[key],
            s=70,
            label=outcome.method.label,
        )
    teacher = study.gate[1]
    axes.axhline(teacher, color=BASE_COLOR, linestyle=":", linewidth=1)
    axes.text(
        1.0,
        teacher + 0.01,
        "base, shown the demonstration ",
        color=BASE_COLOR,
        fontsize="small",
        ha="right",
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    axes.set_title("What was learnt, and what moved elsewhere", fontsize="medium")
    axes.set_xlabel("KL(base || model) on everyday prompts, nats per token")
    axes.set_ylabel("held-out orders answered exactly")
    axes.set_ylim(-0.05, 1.08)
    widest = max([outcome.kl for outcome in study.outcomes], default=0.0)
    axes.set_xlim(-0.04 * max(widest, 0.01), 1.15 * max(widest, 0.01))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", loc="lower right")
