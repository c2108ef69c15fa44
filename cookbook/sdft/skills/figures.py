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
KL_LABEL = "KL to base on everyday prompts, nats a token\n(further right: closer to the base)"
STYLES = ("-", "--", "-.", ":")  # by the rate, where several of a method went on
APART = 0.05  # of a stage, from line to line: else whiskers would stand upon one another
THIN = {"elinewidth": 0.8, "capsize": 2}


def draw_frontier(points: Sequence[Point], skill: str, path: Path) -> Figure:
    """The new skill against what was kept: one panel by the first benchmark, where there is one,
    and one by the KL to the base, whose axis is turned so that better is to the right in both.
    """
    benchmarks = _benchmarks([run for point in points for run in point.runs])[:1]
    figure = Figure(figsize=(5.2 * (len(benchmarks) + 1), 4.8), layout="constrained")
    skills = [estimate(point.runs, skill) for point in points]
    panels = [
        ([estimate(p.runs, name) for p in points], "share of HumanEval solved")
        for name in benchmarks
    ]
    for place, (kept, label) in enumerate([*panels, (None, KL_LABEL)], 1):
        axes = figure.add_subplot(1, len(panels) + 1, place)
        for method in dict.fromkeys(point.method for point in points):
            own = [at for at, point in enumerate(points) if point.method == method]
            own.sort(key=lambda at: points[at].rate)
            across = [kept[at] for at in own] if kept else None
            _draw_points(axes, [points[at] for at in own], across, [skills[at] for at in own])
        axes.set_xlabel(label)
        axes.set_ylabel(f"{skill}: share of held-out rows right")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        if kept is None:
            axes.invert_xaxis()
    axes.legend(frameon=False, fontsize="small")
    _say_whiskers(figure, [point.runs for point in points], "; the KL has none")
    figure.savefig(path, dpi=130)
    return figure


def _draw_points(
    axes: Any, points: Sequence[Point], kept: Sequence[Estimate] | None, skills: Sequence[Estimate]
) -> None:
    """The rates of a method, joined, with their intervals, and each seed as a small point; by the
    KL, which has no interval, where `kept` is None.
    """
    color = COLORS[points[0].method]
    x = [fmean(point.kl) for point in points] if kept is None else [one.value for one in kept]
    axes.errorbar(
        x,
        [one.value for one in skills],
        xerr=None if kept is None else _whiskers(kept),
        yerr=_whiskers(skills),
        label=LABELS[points[0].method],
        color=color,
        marker="o",
        markersize=5,
        linewidth=1,
        **THIN,
    )
    for point, across, up in zip(points, x, skills, strict=True):
        if len(point.runs) > 1:
            seeds = point.kl if kept is None else point.kept
            axes.plot(seeds, point.skill, ".", color=color, markersize=3, alpha=0.6)
        if point.rate and kept is None:  # by HumanEval points stand too near one another
            axes.annotate(
                exact(point.rate),
                (across, up.value),
                xytext=(4, 4 if point.method in ABOVE else -10),
                textcoords="offset points",
                fontsize=7,
                color=color,
            )


def _whiskers(estimates: Sequence[Estimate]) -> list[list[float]]:
    # An interval may end at the value itself, but for rounding.
    return [
        [max(0.0, one.value - one.low) for one in estimates],
        [max(0.0, one.high - one.value) for one in estimates],
    ]


def _say_whiskers(figure: Figure, groups: Sequence[Sequence[Run]], without: str) -> None:
    """What is drawn about a value, in words below the panels, and what has no whiskers."""
    has_seeds = any(len(own) > 1 for own in groups)
    drawn_of = "seeds and held-out rows" if has_seeds else "held-out rows"
    said = f"whiskers: 95 % interval over {drawn_of}, as in the table{without}"
    said += "; small points: seeds" if has_seeds else ""
    figure.supxlabel(said, fontsize="small", color="#555555")


def draw_sequence(runs: Sequence[Run], skills: Sequence[str], path: Path) -> Figure:
    """Every skill, and the first benchmark, over the stages: a panel for each, in it a line for
    each method at each rate that went beyond the first. A dotted line is the stage in which the
    skill was taught.
    """
    names = [*skills, *_benchmarks(runs)[:1]]
    figure = Figure(figsize=(4.0 * len(names), 4.1), layout="constrained")
    went_on = sorted({(run.method, run.rate) for run in runs if run.stage > 1})
    rates = sorted({rate for _, rate in went_on})
    styles = dict(zip(rates, itertools.cycle(STYLES), strict=False))
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for at, (method, rate) in enumerate(went_on):
            own = [r for r in runs if (r.method, r.rate) == (method, rate) or r.stage == 0]
            look = {"color": COLORS[method], "linestyle": styles[rate]}
            beside = APART * (at - (len(went_on) - 1) / 2)
            _draw_stages(axes, own, name, beside, label=f"{LABELS[method]}, {exact(rate)}", **look)
        if name in skills:
            _mark_taught(axes, place)
        axes.set_title(name, pad=16)
        axes.set_xticks(range(len(skills) + 1), ["base", *(f"+ {one}" for one in skills)])
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlim(-0.3, len(skills) + 0.3)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share that is right")
    if went_on:
        figure.axes[-1].legend(frameon=False, fontsize="small")
    _say_whiskers(figure, list(_grouped(runs).values()), "")
    figure.savefig(path, dpi=130)
    return figure


def _mark_taught(axes: Any, stage: int) -> None:
    axes.axvline(stage, linestyle=":", color="#7f7f7f", linewidth=1)
    axes.annotate(
        "taught here",
        (stage, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        color="#555555",
    )


def _draw_stages(axes: Any, runs: Sequence[Run], name: str, beside: float, **look: str) -> None:
    """A line over the stages, each so far beside its place, with intervals and seeds."""
    stages = sorted({run.stage for run in runs})
    groups = [[run for run in runs if run.stage == stage] for stage in stages]
    places = [stage + beside for stage in stages]
    found = [estimate(own, name) for own in groups]
    values = [one.value for one in found]
    axes.errorbar(places, values, yerr=_whiskers(found), marker="o", markersize=4, **THIN, **look)
    for place, own in zip(places, groups, strict=True):
        if len(own) > 1:
            seeds = [run.score(name) for run in own]
            axes.plot([place] * len(own), seeds, ".", color=look["color"], markersize=3, alpha=0.6)


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
