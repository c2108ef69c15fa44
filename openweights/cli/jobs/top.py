"""`ow top`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from openweights.cli.jobs.ls import last_values, last_words, model_name, short_models
from openweights.cli.output import (
    GAP,
    STATUS_STYLES,
    age,
    fit,
    natural_widths,
    one_line,
    print_table,
)
from openweights.cli.store import is_remote, open_store
from openweights.client.job_kinds import kind_word
from openweights.client.secrets import without_keys
from openweights.client.watching.metrics import LEADING
from openweights.client.watching.waiting import states_of
from openweights.dashboard.series import SeriesCache
from openweights.types import JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

COLUMNS = ("id", "status", "kind", "model", "age", "curve", "last")
# What is left out first in a narrow terminal, and how much of the last column is to be there.
_DISPENSABLE = ("curve", "kind", "model", "age")
_ENOUGH = 20
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 16
_READ_S = 0.2  # of a long history in one look
_ENDED = 20
_MOST = 200  # of those that wait


@click.command()
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.2, max=3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
def top(every_s: float) -> None:
    """Show what runs, what waits and what ended last, until Ctrl-C.

    Where the output is no terminal it is printed once.
    """
    with open_store() as backend:
        cache = SeriesCache(backend)
        if not sys.stdout.isatty():
            print_table(COLUMNS, rows(backend, cache, _MOST))
            return
        _follow(backend, cache, every_s)


def _follow(backend: Backend, cache: SeriesCache, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with (
        suppress(KeyboardInterrupt),  # as it is meant to be left
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            lines = rows(backend, cache, console.height - 2)
            live.update(_table(lines, console.width), refresh=True)
            time.sleep(every_s)


def _table(lines: Sequence[Sequence[str]], room: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    widths, lines = fitting(lines, room)
    for name, width in widths.items():
        table.add_column(name.upper(), no_wrap=True, overflow="ellipsis", width=width)
    for line in lines:
        # Text, not str: a model called "[bold]" is no markup.
        table.add_row(*(Text(cell, style=STATUS_STYLES.get(cell, "")) for cell in line))
    return table


def fitting(
    lines: Sequence[Sequence[str]], room: int
) -> tuple[dict[str, int], Sequence[Sequence[str]]]:
    """The columns that fit into `room`, with their widths, and the rows with these cells alone.
    Where there is not room for all, models lose their organizations, and then columns are left out
    until there is some for what the last one says.
    """
    names = list(COLUMNS)
    cells = short_models(names, [[one_line(cell) for cell in line] for line in lines], room)
    natural = natural_widths([names, *cells], room)
    for dropped in _DISPENSABLE:
        if fit(natural, room)[-1] >= min(_ENOUGH, natural[-1]):
            break
        at = names.index(dropped)
        names, cells = _without(names, at), [_without(line, at) for line in cells]
        natural = natural_widths([names, *cells], room)
    return dict(zip(names, fit(natural, room), strict=True)), cells


def _without(line: Sequence[str], at: int) -> list[str]:
    return [*line[:at], *line[at + 1 :]]


def rows(backend: Backend, cache: SeriesCache, most: int) -> list[list[str]]:
    """Jobs that run, then those that wait, then the last that ended, a row for each."""
    jobs = backend.list_jobs(statuses=["in_progress"], limit=_MOST)
    jobs += backend.list_jobs(statuses=["pending"], limit=_MOST)
    jobs += backend.list_jobs(statuses=["completed", "failed", "canceled"], limit=_ENDED)
    jobs = [without_keys(job) for job in jobs[: max(most, 1)]]
    states = states_of(backend, jobs, is_remote=is_remote())
    return [_row(backend, cache, job, states.get(job.id, "")) for job in jobs]


def _row(backend: Backend, cache: SeriesCache, job: JobRecord, now: str) -> list[str]:
    measured = cache.of(job.id, _READ_S).by_name if job.attempts else {}
    curves = [list(measured[name].values) for name in LEADING if name in measured]
    last = last_values(backend, job)
    said = str(last.get("error") or now or last_words(last, job) or "-")
    return [
        job.id,
        job.status,
        kind_word(job),
        model_name(job),
        age(job.created_at),
        spark(curves[0]) if curves else "",
        said,
    ]


def spark(values: Sequence[float], width: int = _SPARK) -> str:
    """The values as a line of bars, the mean of neighbours where there are more than `width`."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    if count < 2:  # noqa: PLR2004 - one value is no line
        return ""
    edges = [round(place * len(finite) / count) for place in range(count + 1)]
    pieces = [finite[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(
        _BARS[min(int((mean - low) / span * len(_BARS)), len(_BARS) - 1)] for mean in means
    )
