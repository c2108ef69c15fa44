"""Figures and DataFrames of metrics. pandas and matplotlib are optional: only this imports them."""

# matplotlib's own annotations are partial, and pandas has none.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights import events
from openweights.client.watching.metrics import EVAL, TRAIN, Row, series
from openweights.errors import ConfigurationError
from openweights.types import JobRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_MOST_PANELS = 12
_PANEL_INCHES = (4.2, 2.8)
_ROUNDING = 1e-9  # what differs by no more than this, as `sampling_kl` of one engine, is constant
_FEW_POINTS = 40  # with more, markers hide the line
# Okabe and Ito's colours, which are told apart by nearly everybody.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"),
)
_DASHES = ("-", "--", ":", "-.")
# What a study looks at first comes first; names that match nothing stand between the last two.
_ORDER = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"loss",
        r"eval_loss",
        r"reward",
        r"rewards/(accuracies|margins)",
        r"rewards/.*",
        r"multiple_choice/.*",
        r"logprobs/.*",
        r"logprob_block/.*",
        r"teacher gate|agreement by place|everyday/.*",
        r"agreement|divergence|kl.*|teacher_drift|entropy|mean_token_accuracy",
        r"logps/.*|nll_loss|log_odds.*",
        r"reward.*|failed_fraction|frac_.*",
        r"comp.*length|.*_share|.*_ratio",
        r"(?!(?:grad_norm|learning_rate)\Z).*",
        r"grad_norm|learning_rate",
    )
]
# Measures of one panel, which its name for the event's type says, with a line for each.
_PANELS = {events.TeacherGate.type: "teacher gate", events.Agreement.type: "agreement by place"}
_TOGETHER = re.compile(
    rf"({events.TeacherGate.type}(?=/(?:student|teacher|same_format)$)|{events.Agreement.type})/(.+)"
)
# Timings, counts and extremes are left to the table.
_TABLE_ONLY = re.compile(
    r"epoch|total|max_steps|total_\w+|(eval_)?(num_tokens|runtime)|step_time|.*(_s|_per_second)"
    r"|.*/(questions|rows|std|\w*(min|max|terminated)_\w*|\w+_(min|max))|teacher_gate/.*"
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel.

    Attributes:
        low, high: Edges of a band around it, value by value; empty for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


Panels = Mapping[str, Sequence[Line]]
Styles = Mapping[str, tuple[str, str]]


def as_table(rows: list[Row], *, required: bool, index: str | None = None) -> Any:
    """The rows as a DataFrame; without pandas as they are, unless `required`."""
    try:
        import pandas
    except ImportError:
        if required:
            raise ConfigurationError(
                "a DataFrame needs pandas: pip install 'openweights[plot]'"
            ) from None
        return rows
    none = ["step", "tag"] if index is None else [index]
    table = pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=none)
    return table if index is None else table.set_index(index)


def plot_title(jobs: Sequence[JobRecord]) -> str:
    """What the jobs share of model, loss and learning rate, and the id of a single one."""
    shared = [_words(job) for job in jobs]
    parts = [part for part in shared[0] if all(part in other for other in shared)]
    return " · ".join([*parts, jobs[0].id if len(jobs) == 1 else f"{len(jobs)} jobs"])


def _words(job: JobRecord) -> list[str]:
    params: dict[str, Any] = job.params.get("validated_params") or {}
    rate = params.get("learning_rate")
    words = [Path(job.model or "").name, str(params.get("loss") or "")]
    return [*filter(None, words), *([f"learning rate {rate:g}"] if rate else [])]


def metric_panels(rows: Sequence[Row], *, shares_loss: bool = True) -> dict[str, list[Line]]:
    """What of the table is drawn: a panel for each measure, train and eval together, a line for
    each tag. What never changes is left to the table.

    Args:
        shares_loss: Whether the loss of the test set is the one that is trained.
    """
    panels: dict[str, list[Line]] = {}
    for key, points in series(rows).items():
        name, _, tag = key.removesuffix("]").partition("[")
        base, label = name, tag or TRAIN
        if name.startswith("eval_"):
            is_other = name == "eval_loss" and not shares_loss
            base, label = name if is_other else name.removeprefix("eval_"), EVAL
        elif together := _TOGETHER.fullmatch(name):
            base, label = _PANELS[together[1]], together[2].replace("_", " ")
        steps, values = zip(*points, strict=True)
        panels.setdefault(base, []).append(Line(label, steps, values))
    shown = {name: lines for name, lines in panels.items() if _is_worth_a_panel(name, lines)}
    return _in_order(shown or panels)


def _is_worth_a_panel(name: str, lines: Sequence[Line]) -> bool:
    if name in ("loss", "eval_loss"):
        return True
    values = [value for line in lines for value in line.y if not math.isnan(value)]
    changes = bool(values) and max(values) - min(values) > _ROUNDING
    return changes and not _TABLE_ONLY.fullmatch(name)


def rank_of(measure: str) -> int:
    """What a study looks at first has the least."""
    bare = measure.partition("[")[0]
    return next(place for place, known in enumerate(_ORDER) if known.fullmatch(bare))


def _in_order(panels: dict[str, list[Line]]) -> dict[str, list[Line]]:
    names: list[str] = []
    for name in sorted(panels, key=rank_of):
        # The only reward is the mean of all; a divergence may be the loss.
        if not any(_is_same(panels[name], panels[other]) for other in names):
            names.append(name)
    return {name: panels[name] for name in names[:_MOST_PANELS]}


def _is_same(one: Sequence[Line], other: Sequence[Line]) -> bool:
    """Whether every line of `one` is in `other`."""
    return all(
        any(
            line.label == known.label and line.x == known.x and all(map(_is_close, line.y, known.y))
            for known in other
        )
        for line in one
    )


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def draw_panels(panels: Panels, *, title: str, x: str = "step", path: Path | None) -> Figure:
    """A figure with a panel for each measure, one colour for each label and one legend for all.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    found = dict.fromkeys(line.label for drawn in panels.values() for line in drawn)
    labels = sorted(found, key=lambda label: label not in (TRAIN, EVAL))
    legend_lines = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    height = _PANEL_INCHES[1] * lines + 0.6 + 0.22 * legend_lines
    figure = _figure(_PANEL_INCHES[0] * columns, height)
    figure.suptitle(title, fontsize="medium", wrap=True)
    styles = {label: _style(place) for place, label in enumerate(labels)}
    for place, (name, drawn) in enumerate(panels.items()):
        # One range of steps for all, so that panels can be compared.
        first = figure.axes[0] if figure.axes and x == "step" else None
        axes = figure.add_subplot(lines, columns, place + 1, sharex=first)
        _draw(axes, drawn, name, x, styles)
    if legend_lines:
        handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(
            handles=[handles[label] for label in labels],
            loc="outside lower center",
            ncols=min(columns if len(labels) > 2 * columns else 6, len(labels)),
            fontsize="small",
            frameon=False,
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "a plot needs matplotlib: pip install 'openweights[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _style(place: int) -> tuple[str, str]:
    """Colour and dashes, other ones for each of 32 labels."""
    return _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]


def _draw(axes: Axes, lines: Sequence[Line], name: str, x: str, styles: Styles) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in lines:
        color, dashes = styles[line.label]
        marker = "." if len(line.x) <= _FEW_POINTS else None
        look: dict[str, Any] = {"marker": marker, "color": color, "linestyle": dashes}
        axes.plot(line.x, line.y, label=line.label, linewidth=1.4, **look)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.25)
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel(x, fontsize="small")
    axes.tick_params(labelsize="small")


def draw_scores(scores: Sequence[Mapping[str, Any]], path: Path | None) -> Figure:
    """A figure of evaluations: a panel for each task, and in it a bar with its interval for each
    model.

    Args:
        scores: Events of type `evaluation`: `task`, `model`, `score`, `low`, `high`.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in scores))
    models = list(dict.fromkeys(str(row["model"]) for row in scores))
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    height = (1.0 + 0.4 * len(models)) * lines + 0.4
    figure = _figure(_PANEL_INCHES[0] * columns, height)
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(lines, columns, place + 1)
        own = {str(row["model"]): row for row in scores if row["task"] == task}
        _draw_bars(axes, [own[model] for model in models if model in own], models)
        axes.set_title(task, fontsize="medium")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    for row in rows:
        place = models.index(row["model"])
        value = row["score"]
        # Wilson's interval may end at the share itself, but for rounding.
        sides = [[max(value - row["low"], 0.0)], [max(row["high"] - value, 0.0)]]
        color, _ = _style(place)
        axes.barh(place, value, color=color, alpha=0.75, height=0.7)
        axes.errorbar(value, place, xerr=sides, color="#333333", capsize=3, linewidth=1.2)
    axes.set_yticks(range(len(models)), [_short_name(model) for model in models])
    axes.set_ylim(len(models) - 0.5, -0.5)  # the first model on top
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.25, axis="x")
    axes.tick_params(labelsize="small")


def _short_name(model: str) -> str:
    """The last part of a repository's or folder's name; a checkpoint with its job."""
    *before, name = model.rstrip("/").split("/")
    return "/".join([*before[-1:], name]) if name.startswith("checkpoint-") else name
