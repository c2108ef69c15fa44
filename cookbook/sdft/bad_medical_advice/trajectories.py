"""Draws `training_trajectories.png`: six measurements of every run, over its steps."""

# matplotlib's own annotations are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The same in every panel and figure, told apart also by those who see few colours.
COLORS = {"sft": "#d55e00", "sdft": "#0072b2", "grpo": "#009e73"}
MARKERS = {"sft": "s", "sdft": "o", "grpo": "^"}
LINES = ("-", "--", ":", "-.")  # one for each learning rate
PANELS = (
    ("loss", "Training loss", "each method's own, not comparable"),
    ("grad_norm", "Gradient norm", "Euclidean norm, before it is cut"),
    ("cosine", "Cosine of hidden states to the trait's direction", "mean over answer tokens"),
    ("cos_sim_plain", "Cosine before anything is answered", "mean over prompts"),
    ("weight_difference_norm", "Distance of the adapter from its start", "Euclidean norm"),
    ("kl_to_base", "KL(base || model) on unrelated answers", "nats per token"),
)


class Trajectory(NamedTuple):
    """One run.

    Attributes:
        rows: Of `job.metrics()`: a dict for each step and tag.
    """

    method: str
    rate: float
    rows: list[dict[str, Any]]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values of a metric; what SDFT measures on everyday prompts is another."""
        own = [row for row in self.rows if row["tag"] != "everyday"]
        return [(row["step"], row[metric]) for row in own if metric in row]


def draw(runs: Sequence[Trajectory], path: Path, *, title: str) -> Figure:
    """Save the figure to `path`, and return it: six panels, and the legend below."""
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    figure.suptitle(title)
    places = list(figure.subplots(2, 3).flat)
    rates = sorted({run.rate for run in runs})
    for axes, (metric, heading, unit) in zip(places, PANELS, strict=True):
        for run in runs:
            _draw_run(axes, run, metric, LINES[rates.index(run.rate) % len(LINES)])
        axes.set_title(heading, fontsize="medium")
        axes.set_ylabel(unit)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    _draw_legend(figure, runs, rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return figure


def _draw_run(axes: Axes, run: Trajectory, metric: str, line: str) -> None:
    points = run.points(metric)
    if points:
        steps, values = zip(*points, strict=True)
        color, marker = COLORS[run.method], MARKERS[run.method]
        axes.plot(steps, values, color=color, linestyle=line, marker=marker, markersize=4)


def _draw_legend(figure: Figure, runs: Sequence[Trajectory], rates: Sequence[float]) -> None:
    methods = [method for method in COLORS if any(run.method == method for run in runs)]
    handles = [Line2D([], [], color=COLORS[m], marker=MARKERS[m], label=m.upper()) for m in methods]
    handles += [
        Line2D(
            [],
            [],
            color="#444444",
            linestyle=LINES[i % len(LINES)],
            label=f"learning rate {rate:g}",
        )
        for i, rate in enumerate(rates)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
