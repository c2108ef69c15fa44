"""`ow compare` and `ow plot`: jobs beside one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from openweights.cli.output import (
    GAP,
    json_option,
    note,
    one_line,
    print_json,
    print_table,
    terminal_width,
)
from openweights.cli.store import JOB_ID
from openweights.client.watching.file_names import file_names, with_names
from openweights.errors import InvalidInputError
from openweights.number_words import number_words, value_words

Row = Mapping[str, Any]


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JOB_ID)
@click.option("-a", "--all", "show_all", is_flag=True, help="Every parameter and measure.")
@json_option
def compare(jobs: tuple[str, ...], show_all: bool, as_json: bool) -> None:
    """Compare jobs: what differs, and where they ended.

    A column for each job; a row for each parameter that was chosen and differs, and for the last
    value of each measure that says how good a model is. --all adds defaults that only some of the
    losses have, what explains a measure, timings and counts. What does not fit the terminal follows
    below.
    """
    from openweights.client import OpenWeights
    from openweights.client.watching.comparison import comparison_columns, measured_names
    from openweights.client.watching.unmeasured import asked_for_elsewhere, unmeasured

    ow = OpenWeights()
    rows = ow.compare(jobs, as_dataframe=False)
    if as_json:
        print_json(rows)
        return
    records = [ow.jobs.retrieve(job).record for job in jobs]
    every, main = comparison_columns(records, rows)
    names = every if show_all else every[:main]
    # Of all of them at once: a row alone does not know that another's file has the same name.
    files = file_names(ow.backend, rows)
    _print_blocks(with_names(rows, files), with_names(names, files))
    for missing in asked_for_elsewhere(unmeasured(records, measured_names(rows))):
        note(missing.words())
    if left_out := len(every) - len(names):
        note(
            f"{left_out} more parameters and measures are not shown; `ow compare --all` shows them"
        )


def _print_blocks(rows: Sequence[Row], names: Sequence[str]) -> None:
    cells = [[str(row["id"]), *(_cell(row.get(name)) for name in names)] for row in rows]
    room = terminal_width() - max(map(len, names))
    for number, block in enumerate(_blocks(cells, room)):
        if number:
            click.echo()
        heading, *lines = zip(("", *names), *block, strict=True)
        print_table(heading, lines, is_upper=False)


def _blocks(columns: Sequence[list[str]], room: int) -> Iterator[list[list[str]]]:
    """The columns that fit beside each other, in order; one at least."""
    block: list[list[str]] = []
    left = room
    for column in columns:
        width = max(map(len, column)) + GAP
        if block and width > left:
            yield block
            block, left = [], room
        block.append(column)
        left -= width
    yield block


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return number_words(value, digits=5)
    return one_line(value_words(value), 40)


@click.command()
@click.argument("jobs", nargs=-1, required=True, type=JOB_ID)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file for the figure; its ending decides the format.",
)
@click.option("-x", default="step", show_default=True, help="The step, or a measure.")
@click.option("-y", multiple=True, help="A measure; may be given several times.")
@click.option("--group-by", multiple=True, help="A parameter, such as meta.rate, to name lines by.")
@click.option("--band", help="A parameter, such as seed, to average over.")
def plot(
    jobs: tuple[str, ...],
    output: Path | None,
    x: str,
    y: tuple[str, ...],
    group_by: tuple[str, ...],
    band: str | None,
) -> None:
    """Draw what jobs have measured.

    All of one job; of several the loss and what was measured on other sets, a line for each job.
    Without -o in the terminal, if it shows pictures (kitty's, iTerm2's or sixels), else into a PNG
    here.
    """
    from openweights.cli.jobs.pictures import picture_protocol, show_figure
    from openweights.client import OpenWeights

    protocol = picture_protocol() if output is None else None
    if output is None and protocol is None:
        output = Path(f"{jobs[0]}.png" if len(jobs) == 1 else "jobs.png")
    if output is not None:
        _check_output(output)
    ow = OpenWeights()
    if len(jobs) == 1 and x == "step" and not y:
        figure = ow.jobs.retrieve(jobs[0]).plot(output)
    else:
        figure = ow.plot(jobs, output, x=x, y=y or None, group_by=group_by or None, band=band)
    if protocol is not None:
        show_figure(figure, protocol)
    else:
        click.echo(str(output))


def _check_output(output: Path) -> None:
    from openweights.client.watching.plot import check_format

    try:
        check_format(output)
    except InvalidInputError as error:
        raise click.BadParameter(str(error), param_hint="--output") from None
