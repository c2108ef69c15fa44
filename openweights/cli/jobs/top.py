"""`ow top`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from openweights.cli.jobs.ls import last_values, last_words, model_name
from openweights.cli.output import STATUS_STYLES, age, one_line, print_table
from openweights.cli.store import is_remote, open_store
from openweights.client.job_kinds import kind_word
from openweights.client.secrets import without_keys
from openweights.client.watching.metrics import LEADING
from openweights.client.watching.waiting import state_of
from openweights.dashboard.series import SeriesCache
from openweights.types import ENDED, JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

COLUMNS = ("id", "status", "kind", "model", "age", "curve", "last")
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
            live.update(_table(rows(backend, cache, console.height - 2)), refresh=True)
            time.sleep(every_s)


def _table(lines: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        is_fixed = name in ("id", "status", "age", "curve")
        table.add_column(
            name.upper(), no_wrap=True, overflow="ellipsis", ratio=None if is_fixed else 1
        )
    for line in lines:
        # Text, not str: a model called "[bold]" is no markup.
        table.add_row(*(Text(one_line(cell), style=STATUS_STYLES.get(cell, "")) for cell in line))
    return table


def rows(backend: Backend, cache: SeriesCache, most: int) -> list[list[str]]:
    """Jobs that run, then those that wait, then the last that ended, a row for each."""
    jobs = backend.list_jobs(statuses=["in_progress"], limit=_MOST)
    jobs += backend.list_jobs(statuses=["pending"], limit=_MOST)
    jobs += backend.list_jobs(statuses=["completed", "failed", "canceled"], limit=_ENDED)
    return [_row(backend, cache, without_keys(job)) for job in jobs[: max(most, 1)]]


def _row(backend: Backend, cache: SeriesCache, job: JobRecord) -> list[str]:
    measured = cache.of(job.id, _READ_S).by_name if job.attempts else {}
    curves = [list(measured[name].values) for name in LEADING if name in measured]
    last = last_values(backend, job)
    now = "" if job.status in ENDED else state_of(backend, job, is_remote=is_remote())
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
