"""What the study found: points, intervals, the choice of a rate, two figures and a table."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from openweights.jobs.evaluate.intervals import RESAMPLES, Estimate, mean_score

LABELS = {
    "base": "base",
    "sft": "SFT",
    "sdft_forward": "SDFT, forward KL",
    "sdft_reverse": "SDFT, reverse KL",
    "sdft_frozen": "SDFT, frozen teacher",
    "grpo": "GRPO",
}
# Okabe and Ito's colours, which are told apart by nearly everybody.
COLORS = dict(
    zip(LABELS, ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00"), strict=True)
)
NEARLY_BEST = 0.95  # of the best score, for a rate to count as reaching it


@dataclass(frozen=True, slots=True)
class Run:
    """A model of the study, and what was measured of it.

    Attributes:
        stage: How many skills were taught so far; 0 of the base.
        scores: By skill: 0 or 1 for each held-out row.
        kept: By benchmark: the share of problems solved.
        kl: To the base, on everyday prompts, in nats a token.
    """

    method: str
    rate: float
    seed: int
    stage: int
    job_id: str = ""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    kl: float = 0.0

    @property
    def label(self) -> str:
        """Names it for people."""
        rate = f" {self.rate:g}, seed {self.seed}, stage {self.stage}" if self.stage else ""
        return LABELS[self.method] + rate

    def measured(
        self, scores: Mapping[str, Sequence[float]], kept: Mapping[str, float], kl: float
    ) -> Run:
        """With what an evaluation found."""
        return replace(self, scores=scores, kept=kept, kl=kl)

    def score(self, skill: str) -> float:
        """The share of a skill's rows that are right."""
        return fmean(self.scores[skill])

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Point(NamedTuple):
    """A method at a rate, over its seeds.

    Attributes:
        skill: Of the new skill, one value for each seed.
        kept: Of the first benchmark, likewise; empty without one.
        kl: Likewise.
    """

    method: str
    rate: float
    skill: list[float]
    kept: list[float]
    kl: list[float]


def frontier_points(runs: Iterable[Run], skill: str) -> list[Point]:
    """The base and every (method, rate) of the first stage."""
    points: dict[tuple[str, float], Point] = {}
    for run in runs:
        if run.stage <= 1:
            empty = Point(run.method, run.rate, [], [], [])
            point = points.setdefault((run.method, run.rate), empty)
            point.skill.append(run.score(skill))
            point.kept.extend(list(run.kept.values())[:1])
            point.kl.append(run.kl)
    return list(points.values())


def chosen_rates(points: Sequence[Point]) -> dict[str, float]:
    """Of each method the rate that moved the model least of those that nearly reach its best."""
    chosen: dict[str, float] = {}
    for method in dict.fromkeys(point.method for point in points if point.method != "base"):
        own = [point for point in points if point.method == method]
        best = max(fmean(point.skill) for point in own)
        good = [point for point in own if fmean(point.skill) >= NEARLY_BEST * best]
        chosen[method] = min(good, key=lambda point: fmean(point.kl)).rate
    return chosen


def estimate(runs: Sequence[Run], skill: str, *, seed: int = 0) -> Estimate:
    """A skill's score over seeds, with a 95 % interval.

    Of one seed it is that over rows. Of several the bootstrap draws seeds, and of each its rows, so
    that the interval knows of both.
    """
    if len(runs) == 1:
        return mean_score(runs[0].scores[skill])
    draw = random.Random(seed)
    means: list[float] = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(runs, k=len(runs))
        means.append(fmean(_resampled(run.scores[skill], draw) for run in drawn))
    means.sort()
    low, high = means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]
    return Estimate(fmean(run.score(skill) for run in runs), low, high)


def _resampled(scores: Sequence[float], draw: random.Random) -> float:
    return fmean(draw.choices(scores, k=len(scores)))


# ---- what is shown -------------------------------------------------------------------------------


def draw_frontier(points: Sequence[Point], skill: str, path: Path) -> Figure:
    """The new skill against what was kept: one panel by the first benchmark, where there is one,
    and one by the KL to the base, whose axis is turned so that better is to the right in both.
    """
    measures = [("kl", "KL to base on everyday prompts, nats a token")]
    if any(point.kept for point in points):
        measures.insert(0, ("kept", "share of HumanEval solved"))
    figure = Figure(figsize=(5.2 * len(measures), 4.4), layout="constrained")
    for place, (name, label) in enumerate(measures, 1):
        axes = figure.add_subplot(1, len(measures), place)
        for method in dict.fromkeys(point.method for point in points):
            own = [point for point in points if point.method == method]
            _draw_points(axes, own, name)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{skill}: share of held-out rows right")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        if name == "kl":
            axes.invert_xaxis()
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return figure


def _draw_points(axes: Any, points: Sequence[Point], name: str) -> None:
    """The rates of a method, joined; whiskers reach from the lowest seed to the highest."""
    points = sorted(points, key=lambda point: point.rate)
    x, y = ([getattr(p, key) for p in points] for key in (name, "skill"))
    method = points[0].method
    axes.errorbar(
        list(map(fmean, x)),
        list(map(fmean, y)),
        xerr=_whiskers(x),
        yerr=_whiskers(y),
        label=LABELS[method],
        color=COLORS[method],
        marker="o",
        markersize=5,
        linewidth=1,
        capsize=2,
    )
    for point, across, up in zip(points, x, y, strict=True):
        if point.rate:
            place = (fmean(across), fmean(up))
            axes.annotate(
                f"{point.rate:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7
            )


def _whiskers(values: Sequence[Sequence[float]]) -> list[list[float]]:
    return [
        [fmean(own) - min(own) for own in values],
        [max(own) - fmean(own) for own in values],
    ]


def draw_sequence(runs: Sequence[Run], skills: Sequence[str], path: Path) -> Figure:
    """Every skill over the stages: a panel for each skill, in it a line for each method at the rate
    that went through all stages. A dotted line is the stage in which the skill was taught.
    """
    figure = Figure(figsize=(4.4 * len(skills), 3.8), layout="constrained")
    [base] = [run for run in runs if run.stage == 0]
    last = {(run.method, run.rate) for run in runs if run.stage == len(skills)}
    for place, skill in enumerate(skills, 1):
        axes = figure.add_subplot(1, len(skills), place)
        for method, rate in sorted(last):
            own = [r for r in runs if (r.method, r.rate) == (method, rate)]
            stages = sorted({run.stage for run in own})
            values = [[base.score(skill)]]
            values += [[r.score(skill) for r in own if r.stage == stage] for stage in stages]
            axes.errorbar(
                [0, *stages],
                list(map(fmean, values)),
                yerr=_whiskers(values),
                label=f"{LABELS[method]}, {rate:g}",
                color=COLORS[method],
                marker="o",
                markersize=4,
                capsize=2,
            )
        axes.axvline(place, linestyle=":", color="#7f7f7f", linewidth=1)
        axes.set_title(skill)
        axes.set_xticks(range(len(skills) + 1), ["base", *(f"+ {one}" for one in skills)])
        axes.tick_params(axis="x", labelsize="small")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of held-out rows right")
    if last:
        figure.axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return figure


def table(runs: Sequence[Run], skills: Sequence[str]) -> str:
    """Markdown: a line for each method, rate and stage, with 95 % intervals."""
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.kept))
    columns = ["model", "taught", "seeds", *skills, *benchmarks, "KL to base"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for method, rate, stage in dict.fromkeys((r.method, r.rate, r.stage) for r in runs):
        own = [r for r in runs if (r.method, r.rate, r.stage) == (method, rate, stage)]
        cells = [LABELS[method] + (f", {rate:g}" if rate else ""), ", ".join(skills[:stage])]
        cells.append(str(len(own)) if stage else "")
        cells += [str(estimate(own, skill)) for skill in skills]
        cells += [f"{fmean(r.kept[name] for r in own):.3f}" for name in benchmarks]
        cells.append(f"{fmean(r.kl for r in own):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
