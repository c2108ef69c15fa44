"""Tables and figures of metrics. pandas and matplotlib are optional, and imported here alone."""

# matplotlib's own annotations are partial, and pandas has none.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL_INCHES = (4.0, 2.8)
# Not worth a panel: they say nothing that the steps do not.
_HIDDEN = frozenset({"epoch", "max_steps", "total_steps", "total"})


def as_table(rows: list[dict[str, Any]], *, required: bool) -> Any:
    """The rows as a DataFrame; without pandas as they are, unless `required`."""
    try:
        import pandas
    except ImportError:
        if required:
            raise ConfigurationError(
                "a DataFrame needs pandas: pip install 'openweights[plot]'"
            ) from None
        return rows
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["step", "tag"])


def plot_metrics(rows: list[dict[str, Any]], *, title: str, path: Path | None) -> Figure:
    """A panel for each metric, a line for each tag."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "a plot needs matplotlib: pip install 'openweights[plot]'"
        ) from None
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "tag")))
    shown = [name for name in names if name not in _HIDDEN] or names
    columns = min(_COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for index, name in enumerate(shown):
        _draw(figure.add_subplot(lines, columns, index + 1), rows, name)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _draw(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    tags = list(dict.fromkeys(row["tag"] for row in rows if name in row))
    for tag in tags:
        points = [(row["step"], row[name]) for row in rows if row["tag"] == tag and name in row]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) == 1 else None, label=tag)
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("step")
    if len(tags) > 1:
        axes.legend(fontsize="small")
