"""How `ow` speaks: tables, JSON, notes, and the one place where an error becomes a line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from openweights.errors import InvalidInputError, OpenWeightsError
from openweights.json_values import cleaned

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Wider than any table: piped output is for programs, so nothing is cut there.
_PIPED_WIDTH = 100_000
GAP = 2
_LEAST_WIDTH = 6
_USUAL_FIRST = 28  # characters of an id that nobody has given an end of its own
STATUS_STYLES = {
    "pending": "yellow",
    "in_progress": "cyan",
    "completed": "green",
    "failed": "red",
    "canceled": "dim",
    "ended": "dim",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


# ---- errors --------------------------------------------------------------------------------------


@contextmanager
def error_boundary() -> Generator[None]:
    """Turn what goes wrong inside into one line on stderr and an exit code.

    What we raise on purpose, and what the operating system refuses, is said as it is. Anything else
    is a fault of ours: its traceback goes into a file, whose name is printed. click's own errors
    and exits pass.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt as error:
        for text in getattr(error, "__notes__", ()):
            note(text)
        sys.exit(INTERRUPTED)
    except OpenWeightsError as error:
        fail(str(error) or type(error).__name__)
    except Exception as error:  # noqa: BLE001 - the boundary: no traceback reaches a terminal
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            fail(f"{_file_name(error.filename)}: {error.strerror}")
        fail(f"{type(error).__name__}: {one_line(error)} (traceback in {_write_traceback(error)})")


def fail(message: str, code: int = 1) -> NoReturn:
    """Say `message` on stderr and exit with `code`."""
    note(message)
    sys.exit(code)


def note(message: str) -> None:
    """A line for the person at the terminal, on stderr; further lines are indented."""
    lines = [printable(line) for line in message.strip().splitlines()]
    click.echo("ow: " + "\n    ".join(lines), err=True)


def _file_name(name: object) -> str:
    return printable(name.decode(errors="replace") if isinstance(name, bytes) else str(name))


def _write_traceback(error: BaseException) -> Path:
    import tempfile
    import traceback

    from openweights.settings import Settings

    text = "".join(traceback.format_exception(error))
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{id(error):x}.txt"
    try:
        folder = Settings.from_env().home / "errors"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, OpenWeightsError):
        # The home may be the very thing that is broken.
        path = Path(tempfile.gettempdir()) / f"ow-{name}"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


# ---- text ----------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal."""
    return _CONTROL.sub(" ", text)


def one_line(value: object, limit: int | None = None) -> str:
    """The text of `value` on one line, cut to `limit` characters."""
    text = " ".join(printable(str(value)).split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def compact(value: object) -> str:
    """A value of a record in one line: strings as they are, everything else as JSON."""
    return (
        printable(value) if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    )


def age(moment: datetime, now: datetime | None = None) -> str:
    """How long ago `moment` was, in its largest unit: `45s`, `12m`, `3h`, `8d`."""
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def local_time(moment: datetime) -> str:
    """`moment` on this machine's clock, to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


# ---- tables --------------------------------------------------------------------------------------


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, is_upper: bool = True
) -> None:
    """Print rows under headings, in upper case unless they are names; the first column, which
    people copy, is never shortened: where there is no room, what is long there has its own line.

    On a terminal the other columns are cut to its width; elsewhere nothing is cut.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    room = terminal_width()
    console.width = _PIPED_WIDTH  # columns get their widths from us
    # Text, not str: a model called "[bold]" is no markup.
    cells = [
        [Text(printable(cell), style=STATUS_STYLES.get(cell, "")) for cell in row] for row in rows
    ]
    lines = [[Text(name.upper() if is_upper else name) for name in columns], *cells]
    natural = natural_widths([[cell.plain for cell in line] for line in lines], room)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for heading, width in zip(lines[0], fit(natural, room), strict=True):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", width=width)
    above = [first if first.cell_len > natural[0] else None for first, *_ in cells]
    for alone, (first, *others) in zip(above, cells, strict=True):
        table.add_row(Text() if alone else first, *others)
    with console.capture() as printed:
        console.print(table, crop=False)
    for alone, line in zip([None, *above], printed.get().splitlines(), strict=True):
        if alone:
            click.echo(alone.plain)
        click.echo(line.rstrip(), color=True)


def natural_widths(lines: Sequence[Sequence[str]], room: int) -> list[int]:
    """How many columns of a terminal each column of a table takes, where nothing is cut. Where that
    is more than `room`, the first takes no more than its cells of usual length.
    """
    from rich.cells import cell_len

    taken = [[cell_len(printable(cell)) for cell in column] for column in zip(*lines, strict=True)]
    widths = [max(column) for column in taken]
    if sum(widths) + GAP * (len(widths) - 1) > room:
        usual = [width for width in taken[0] if width <= _USUAL_FIRST]
        widths[0] = max(usual, default=widths[0])
    return widths


def terminal_width() -> int:
    """Columns of the terminal; more than any table has where output is piped."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console.width if console.is_terminal else _PIPED_WIDTH


def fit(natural: Sequence[int], room: int) -> list[int]:
    """Column widths that fit into `room` with the gaps between them: the widest give way first.

    The first column keeps its width whatever happens, and none gets narrower than a few characters.
    """
    widths = list(natural)
    room -= GAP * (len(widths) - 1)
    while sum(widths) > room:
        widest = max(range(1, len(widths)), key=lambda index: widths[index], default=0)
        if widest == 0 or widths[widest] <= _LEAST_WIDTH:
            break
        widths[widest] -= 1
    return widths


def print_fields(values: Mapping[str, object], indent: str = "") -> None:
    """Print names and values in two columns; None and empty values are left out."""
    shown = {name: compact(value) for name, value in values.items() if value or value in (0, False)}
    width = max((len(name) for name in shown), default=0)
    for name, text in shown.items():
        click.echo(f"{indent}{printable(name):<{width}}  {text}")


# ---- JSON ----------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """`value` in JSON's terms: records as objects, moments in ISO 8601, NaN as null."""
    return cleaned(value, "value", other=_other)


def _other(value: Any, _at: str) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)


def print_json(value: object) -> None:
    """Print `value` as indented JSON."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_json_array(values: Iterator[object]) -> None:
    """Print values as one JSON array, an element a line, without holding them all."""
    separator = "[\n"
    for value in values:
        click.echo(f"{separator}  {json.dumps(plain(value), ensure_ascii=False)}", nl=False)
        separator = ",\n"
    click.echo("[]" if separator == "[\n" else "\n]")


def read_text(path: Path) -> str:
    """The text of a file that somebody has named.

    Raises:
        InvalidInputError: It is none in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path}: is no text in UTF-8; save it so") from None


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of such a file that hold something, with their numbers from 1.

    Raises:
        InvalidInputError: As `read_text`.
    """
    # Not `splitlines`, which would end a line at separators that JSON takes in a string.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _read_env_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    from openweights.cluster.supervisor import parse_env
    from openweights.settings import add_to_environment

    if path is not None:
        add_to_environment(parse_env(read_text(path)))


env_file_option = click.option(
    "--env-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_read_env_file,
    expose_value=False,
    is_eager=True,
    metavar="FILE",
    help="Variables to set first, a NAME=value on each line.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
