"""`ow fetch`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from openweights.cli.output import note
from openweights.cli.store import JOB_ID
from openweights.client.jobs import find_job
from openweights.errors import InvalidInputError
from openweights.paths import inside

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_PEEK = 8192  # bytes looked at to tell text from other content


@click.command()
@click.argument("id", metavar="FILE_ID|JOB", type=JOB_ID)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to: a file or folder for FILE_ID, a folder for JOB.",
)
def fetch(id: str, output: Path | None) -> None:
    """Fetch a file, or a job's results.

    A file goes to standard output, or to --output. The results of a job, and its log, go into the
    folder --output, or into one named after the job.
    """
    from openweights.client import OpenWeights

    ow = OpenWeights()
    if ":" in id:
        _fetch_file(ow.backend, id, output)
        return
    job = ow.jobs.retrieve(find_job(ow.backend, id).id)
    folder = output or Path(job.id)
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file; give a folder for the results of a job")
    for path in sorted(job.download(folder)):
        click.echo(path)


def _fetch_file(backend: Backend, file_id: str, output: Path | None) -> None:
    from openweights.client.results import write_stream_to

    record = backend.get_file(file_id)
    if output is None:
        with backend.open_file(file_id) as content:
            _to_stdout(content)
        return
    path = inside(output, record.filename, "the file's name") if output.is_dir() else output
    write_stream_to(backend, file_id, path)
    note(f"{path}: {record.bytes} bytes")


def _to_stdout(content: BinaryIO) -> None:
    beginning = content.read(_PEEK)
    if b"\0" in beginning and sys.stdout.isatty():
        raise InvalidInputError("this file is not text; write it to a file with -o PATH")
    stdout = sys.stdout.buffer
    stdout.write(beginning)
    shutil.copyfileobj(content, stdout)
    stdout.flush()
