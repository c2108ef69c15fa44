"""Figures of metrics. matplotlib is optional: only this imports it."""

# matplotlib's own annotations are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, cast

from openweights.client.watching.metrics import EVAL, TRAIN, Row
from openweights.client.watching.panels import GateBars, Line, columns_in_order
from openweights.errors import ConfigurationError, InvalidInputError
from openweights.models.names import short_name
from openweights.number_words import number_words
from openweights.types import JobRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL_INCHES = (4.2, 2.8)
_NOTE_COLOR = "#555555"
_NOTE_INCHES = 0.17  # of a line below the panels
_NOTE_CHARACTERS = 13  # of an inch of it
_SAMPLE_INCHES = 0.75  # of a legend's entry: the line beside the label, with the gaps around both
_POINTS_PER_INCH = 72
_NAME_CHARACTERS = 26  # of a line of a model's name beside its bar
_NAME_INCHES = 0.2  # of such a line
_FEW_POINTS = 40  # with more, markers hide the line
# Okabe and Ito's colours, which are told apart by nearly everybody.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"),
)
_DASHES = ("-", "--", ":", "-.")
_RATE_DIGITS = 6  # of a rate that was calculated, as 2e-4 / 3, in a title
_LONE_SIZE, _RING = 6, 4  # points: of a marker without a line, and of each further one around it
_PLAIN_POWERS = (-3, 6)  # of ten: smaller and larger values have the power above the axis

_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
_ROOM = 0.2  # of a panel's width, for a figure behind a bar
_GATE_SAYS = {
    "reward": "mean reward",
    "rouge_l": "overlap with the right answer",
    "exact": "share that is the right answer",
    "format": "share that begins and ends as it does",
}

Panels = Mapping[str, Sequence[Line]]
Styles = Mapping[str, tuple[str, str]]


def as_table(rows: list[Row], *, required: bool) -> Any:
    """Rows of measures as a DataFrame, the columns by what they tell; without pandas as they are,
    unless `required`.
    """
    tables = _tables(required)
    if tables is None:
        return rows
    counts = Counter(name for row in rows for name in row if name not in ("step", "tag"))
    return tables.metrics_table(rows, ["step", "tag", *columns_in_order(counts)])


def as_comparison(rows: list[Row], columns: Sequence[str], main: int, *, required: bool) -> Any:
    """Rows of jobs as a DataFrame by id, of which the first `main` columns are printed; without
    pandas as they are, unless `required`.
    """
    tables = _tables(required)
    return rows if tables is None else tables.comparison_table(rows, columns, main)


def _tables(required: bool) -> Any:
    try:
        from openweights.client.watching import tables
    except ImportError:
        if required:
            raise ConfigurationError(
                "a DataFrame needs pandas: pip install 'openweights[plot]'"
            ) from None
        return None
    return tables


def plot_title(jobs: Sequence[JobRecord], names: Mapping[str, str]) -> str:
    """What the jobs share of model, loss and learning rate, and the id of a single one.

    Args:
        names: What models that are jobs' are called, as `model_names` has it.
    """
    shared = [_words(job, names) for job in jobs]
    parts = [part for part in shared[0] if all(part in other for other in shared)]
    return " · ".join([*parts, jobs[0].id if len(jobs) == 1 else f"{len(jobs)} jobs"])


def _words(job: JobRecord, names: Mapping[str, str]) -> list[str]:
    params = job.validated_params
    rate = params.get("learning_rate")
    model = job.model or ""
    words = [names.get(model) or short_name(model), str(params.get("loss") or "")]
    if rate:
        words.append(f"learning rate {number_words(rate, _RATE_DIGITS)}")
    return [*filter(None, words)]


def check_format(path: Path) -> None:
    """See that a figure can be saved as the ending of `path` says.

    Raises:
        ConfigurationError: matplotlib is not installed.
        InvalidInputError: There is no such format; names those that there are.
    """
    known = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        endings = ", ".join(f".{name}" for name in sorted(known))
        raise InvalidInputError(
            f"{path.name}: its ending is no format of a figure; use one of {endings}"
        )


def _save(figure: Figure, path: Path) -> None:
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_panels(
    panels: Panels,
    *,
    title: str,
    x: str = "step",
    path: Path | None,
    has_one_legend: bool = True,
    most: int | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """A figure with a panel for each measure.

    Args:
        has_one_legend: One colour for each label, and one legend for all panels; else each panel
            has its own, if it shows more than the training.
        most: So many panels; below them stands how many more there are.
        notes: Lines below the panels.

    Raises:
        ConfigurationError: matplotlib is not installed.
        InvalidInputError: The ending of `path` is no format.
    """
    left_out = 0 if most is None else max(len(panels) - most, 0)
    panels = dict(islice(panels.items(), most))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = _labels(line for drawn in panels.values() for line in drawn)
    has_legend = has_one_legend and len(labels) > 1
    across = _labels_across(labels, _PANEL_INCHES[0] * columns) if has_legend else 1
    legend_rows = math.ceil(len(labels) / across) if has_legend else 0
    if left_out:
        notes = [*notes, f"{left_out} more measures are in job.metrics()"]
    below = _wrapped(notes, _PANEL_INCHES[0] * columns)
    height = _PANEL_INCHES[1] * rows + 0.6 + 0.22 * legend_rows + _NOTE_INCHES * len(below)
    figure = _figure(_PANEL_INCHES[0] * columns, height)
    figure.suptitle(title, fontsize="medium", wrap=True)
    for place, (name, drawn) in enumerate(panels.items()):
        # One range of steps for all, so that panels can be compared.
        first = figure.axes[0] if figure.axes and x == "step" else None
        axes = figure.add_subplot(rows, columns, place + 1, sharex=first)
        own = labels if has_one_legend else _labels(drawn)
        _draw(axes, drawn, name, x, {label: _style(at) for at, label in enumerate(own)})
        if not has_one_legend and own != [TRAIN]:
            axes.legend(fontsize="x-small", framealpha=0.7, ncols=2 if len(own) > _COLUMNS else 1)
    steps = {at for drawn in panels.values() for line in drawn for at in line.x}
    if x == "step" and len(steps) == 1:  # else the axis would be of fractions of a step
        figure.axes[0].set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    if legend_rows:
        _draw_legend(figure, labels, across, "\n".join(below))
    elif below:
        figure.supxlabel("\n".join(below), fontsize="small", color=_NOTE_COLOR)
    if path is not None:
        _save(figure, path)
    return figure


def _wrapped(notes: Iterable[str], inches: float) -> list[str]:
    """The notes in lines that fit a figure of that width."""
    width = int(inches * _NOTE_CHARACTERS)
    return [line for note in notes for line in wrap(note, width, subsequent_indent="  ")]


def _labels(lines: Iterable[Line]) -> list[str]:
    """Each once, training and test set first."""
    found = dict.fromkeys(line.label for line in lines)
    return sorted(found, key=lambda label: label not in (TRAIN, EVAL))


def _labels_across(labels: Sequence[str], inches: float) -> int:
    """How many labels fit beside one another, each in a column as wide as the widest."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(size="small")
    widest = max(TextPath((0, 0), label, prop=font).get_extents().width for label in labels)
    return min(max(int(inches / (_SAMPLE_INCHES + widest / _POINTS_PER_INCH)), 1), len(labels))


def _draw_legend(figure: Figure, labels: Sequence[str], across: int, above: str) -> None:
    """Below the panels, under a text for which matplotlib would keep no place of its own."""
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    # The look of the longest of them: a point alone is drawn otherwise.
    drawn.sort(key=lambda line: len(cast("Sequence[float]", line.get_xdata())))
    handles = {line.get_label(): line for line in drawn}
    legend = figure.legend(
        title=above or None,
        title_fontsize="small",
        handles=[handles[label] for label in labels],
        loc="outside lower center",
        ncols=across,
        fontsize="small",
        frameon=False,
    )
    legend.get_title().set_color(_NOTE_COLOR)


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

    points = Counter[tuple[float, float]]()  # those that have no line
    for line in lines:
        color, dashes = styles[line.label]
        look: dict[str, Any] = {"color": color, "linestyle": dashes, **_marker(line, points)}
        axes.plot(line.x, line.y, label=line.label, linewidth=1.4, **look)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.ticklabel_format(axis="y", scilimits=_PLAIN_POWERS)
    axes.yaxis.get_offset_text().set_fontsize("small")
    axes.grid(alpha=0.25)
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel(x, fontsize="small")
    axes.tick_params(labelsize="small")


def _marker(line: Line, points: Counter[tuple[float, float]]) -> dict[str, Any]:
    """A point alone has no line that leads the eye to it; one at a place of `points` stands around
    those there as a ring, and does not hide them.
    """
    if len(line.x) > 1:
        return {"marker": "." if len(line.x) <= _FEW_POINTS else None}
    place = (line.x[0], line.y[0]) if line.x else (math.nan, math.nan)
    size = _LONE_SIZE + _RING * points[place]
    fill = "none" if points[place] else "full"
    points[place] += 1
    return {"marker": "o", "markersize": size, "fillstyle": fill}


def draw_gate(bars: GateBars, *, title: str, path: Path | None) -> Figure:
    """A figure of the teacher gate: a panel for each measure, the one that decided first, and in it
    a bar for the student and for each place of the demonstration.

    Raises:
        ConfigurationError: matplotlib is not installed.
        InvalidInputError: The ending of `path` is no format.
    """
    width = _PANEL_INCHES[0] * min(len(bars.scores), _COLUMNS)
    notes = _wrapped([_needed_words(bars)], width)
    most = max(len(own) for own in bars.scores.values())
    figure = _figure(width, 1.6 + 0.4 * most + _NOTE_INCHES * len(notes))
    figure.suptitle(f"{bars.verdict}\n{title}", fontsize="medium", wrap=True)
    for place, (measure, own) in enumerate(bars.scores.items()):
        axes = figure.add_subplot(1, len(bars.scores), place + 1)
        colors = [_style(at)[0] for at in range(len(own))]
        drawn = axes.barh(range(len(own)), list(own.values()), 0.7, color=colors, alpha=0.75)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small", bbox=_ON_WHITE)
        if place == 0:
            axes.axvline(bars.needed, linestyle=":", color="#333333", linewidth=1.4)
        called = [f"{who}, chosen" if who == bars.chosen else who for who in own]
        axes.set_yticks(range(len(own)), called if place == 0 else [""] * len(own))
        axes.set_title(f"{measure}, which decided" if place == 0 else measure, fontsize="medium")
        axes.set_xlabel(_GATE_SAYS[measure], fontsize="small")
        axes.set_xlim(*_range_of_bars([bars.needed, *own.values()] if place == 0 else own.values()))
        axes.set_ylim(most - 0.5, -0.5)  # the student on top
        axes.grid(alpha=0.25, axis="x")
        axes.tick_params(labelsize="small")
    figure.supxlabel("\n".join(notes), fontsize="small", color=_NOTE_COLOR)
    if path is not None:
        _save(figure, path)
    return figure


def _needed_words(bars: GateBars) -> str:
    return (
        "dotted: the student's figure and sdft_gate_margin, which the teacher has to reach; it has "
        f"to be better by more than chance in {bars.rows} prompts, too"
    )


def _range_of_bars(values: Iterable[float]) -> tuple[float, float]:
    """From 0 to 1 at least, with room for the figures at the bars' ends."""
    known = [0.0, 1.0, *filter(math.isfinite, values)]
    low, high = min(known), max(known)
    room = _ROOM * (high - low)
    return low - room * (low < 0), high + room


def draw_scores(
    scores: Sequence[Mapping[str, Any]], path: Path | None, names: Mapping[str, str]
) -> Figure:
    """A figure of evaluations: a panel for each task, and in it a bar with its interval for each
    model.

    Args:
        scores: Events of type `evaluation`: `task`, `model`, `score`, `low`, `high`.
        names: What models that are jobs' are called, as `model_names` has it.

    Raises:
        ConfigurationError: matplotlib is not installed.
        InvalidInputError: The ending of `path` is no format.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in scores))
    models = list(dict.fromkeys(str(row["model"]) for row in scores))
    called = [_in_lines(names.get(model) or short_name(model)) for model in models]
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    bars = sum(max(0.4, _NAME_INCHES * (1 + name.count("\n"))) for name in called)
    figure = _figure(_PANEL_INCHES[0] * columns, (1.0 + bars) * lines + 0.4)
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(lines, columns, place + 1)
        own = {str(row["model"]): row for row in scores if row["task"] == task}
        _draw_bars(axes, [own[model] for model in models if model in own], models)
        # The panels of a row have the same bars, and the first of them their names.
        axes.set_yticks(range(len(models)), called if place % columns == 0 else [""] * len(models))
        axes.set_title(task, fontsize="medium")
    if path is not None:
        _save(figure, path)
    return figure


def _in_lines(name: str) -> str:
    """A name that leaves room for its bar."""
    return "\n".join(wrap(name, _NAME_CHARACTERS, break_on_hyphens=True))


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    for row in rows:
        place = models.index(row["model"])
        value = row["score"]
        # Wilson's interval may end at the share itself, but for rounding.
        sides = [[max(value - row["low"], 0.0)], [max(row["high"] - value, 0.0)]]
        color, _ = _style(place)
        axes.barh(place, value, color=color, alpha=0.75, height=0.7)
        axes.errorbar(value, place, xerr=sides, color="#333333", capsize=3, linewidth=1.2)
    axes.set_ylim(len(models) - 0.5, -0.5)  # the first model on top
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.25, axis="x")
    axes.tick_params(labelsize="small")
