"""What the study shows: two figures, and tables in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from cookbook.sdft.skills.results import LABELS, Point, Run, difference, estimate, exact
from openweights.jobs.evaluate.intervals import Estimate

# Okabe and Ito's colours, which are told apart by nearly everybody.
COLORS = {
    "base": "#7f7f7f",
    "sft": "#d55e00",
    "sdft_forward": "#0072b2",
    "sdft_reverse": "#009e73",
    "sdft_frozen": "#cc79a7",
    "sdft_skip": "#000000",
    "sdft_template": "#f0e442",
    "grpo": "#e69f00",
    "sft_grpo": "#56b4e9",
}
ABOVE = ("sft", "sdft_forward", "grpo", "sft_grpo")  # their rates are written; others' below
STYLES = ("-", "--", "-.", ":")  # by the rate, where several of a method went on
KEPT_MARGIN = 0.08  # about what 164 problems cannot tell apart: less must not fill a figure


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
        else:
            low, high = axes.get_xlim()
            axes.set_xlim(low - KEPT_MARGIN, high + KEPT_MARGIN)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return figure


def _draw_points(axes: Any, points: Sequence[Point], name: str) -> None:
    """The rates of a method, joined; whiskers reach from the lowest seed to the highest, and each
    seed is a small point.
    """
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
        axes.plot(across, up, ".", color=COLORS[method], markersize=3, alpha=0.6)
        if point.rate and name == "kl":  # by HumanEval points stand too near one another
            place = (fmean(across), fmean(up))
            axes.annotate(
                exact(point.rate),
                place,
                xytext=(4, 4 if method in ABOVE else -10),
                textcoords="offset points",
                fontsize=7,
                color=COLORS[method],
            )


def _whiskers(values: Sequence[Sequence[float]]) -> list[list[float]]:
    # Of equal values the mean may be rounded to beside them.
    return [
        [max(0.0, fmean(own) - min(own)) for own in values],
        [max(0.0, max(own) - fmean(own)) for own in values],
    ]


def draw_sequence(runs: Sequence[Run], skills: Sequence[str], path: Path) -> Figure:
    """Every skill, and the first benchmark, over the stages: a panel for each, in it a line for
    each method at each rate that went beyond the first. A dotted line is the stage in which the
    skill was taught.
    """
    names = [*skills, *_benchmarks(runs)[:1]]
    figure = Figure(figsize=(4.0 * len(names), 3.8), layout="constrained")
    went_on = sorted({(run.method, run.rate) for run in runs if run.stage > 1})
    rates = sorted({rate for _, rate in went_on})
    styles = dict(zip(rates, itertools.cycle(STYLES), strict=False))
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for method, rate in went_on:
            own = [r for r in runs if (r.method, r.rate) == (method, rate) or r.stage == 0]
            look = {"color": COLORS[method], "linestyle": styles[rate]}
            _draw_stages(axes, own, name, label=f"{LABELS[method]}, {exact(rate)}", **look)
        if name in skills:
            axes.axvline(place, linestyle=":", color="#7f7f7f", linewidth=1)
        axes.set_title(name)
        axes.set_xticks(range(len(skills) + 1), ["base", *(f"+ {one}" for one in skills)])
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlim(-0.2, len(skills) + 0.2)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share that is right")
    if went_on:
        figure.axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return figure


def _draw_stages(axes: Any, runs: Sequence[Run], name: str, **look: str) -> None:
    stages = sorted({run.stage for run in runs})
    values = [[run.score(name) for run in runs if run.stage == stage] for stage in stages]
    axes.errorbar(
        stages,
        list(map(fmean, values)),
        yerr=_whiskers(values),
        marker="o",
        markersize=4,
        capsize=2,
        **look,
    )


# ---- tables --------------------------------------------------------------------------------------


def _benchmarks(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.kept))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _grouped(runs: Sequence[Run]) -> dict[tuple[str, float, int], list[Run]]:
    """The seeds of each method, rate and stage."""
    groups: dict[tuple[str, float, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.rate, run.stage), []).append(run)
    return groups


def table(runs: Sequence[Run], skills: Sequence[str]) -> str:
    """Markdown: a line for each method, rate and stage, with 95 % intervals."""
    names = [*skills, *_benchmarks(runs)]
    rows: list[list[str]] = []
    for (method, rate, stage), own in _grouped(runs).items():
        cells = [LABELS[method] + (f", {exact(rate)}" if rate else ""), ", ".join(skills[:stage])]
        cells.append(str(len(own)) if stage else "")
        cells += [str(estimate(own, name)) for name in names]
        cells.append(f"{fmean(run.kl for run in own):.3f}")
        cells.append(f"{fmean(run.cost_s for run in own):.0f}" if stage else "")
        rows.append(cells)
    columns = ["model", "taught", "seeds", *names, "KL to base", "training, s"]
    return _markdown(columns, rows)


def differences(runs: Sequence[Run], skills: Sequence[str], against: str = "sft") -> str:
    """Markdown: at each rate and stage how much more every method has right than `against`, with
    95 % intervals; those that do not hold 0 are bold.
    """
    names = [*skills, *_benchmarks(runs)]
    groups = _grouped(runs)
    rows: list[list[str]] = []
    for (method, rate, stage), own in groups.items():
        others = groups.get((against, rate, stage))
        if others and method != against:
            cells = [f"{LABELS[method]} less {LABELS[against]}, {exact(rate)}"]
            cells.append(", ".join(skills[:stage]))
            cells += [_signed(difference(own, others, name)) for name in names]
            rows.append(cells)
    return _markdown(["at equal rates", "taught", *names], rows) if rows else ""


def _signed(value: Estimate) -> str:
    text = f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"
    return text if value.low <= 0 <= value.high else f"**{text}**"
