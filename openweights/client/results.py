"""Writing what runs have left behind, their log and result files, into a folder."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from openweights.client.event_json import json_text
from openweights.errors import InvalidInputError, NotFoundError
from openweights.paths import inside
from openweights.types import EventRecord, RunRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

logger = logging.getLogger(__name__)

# What `run.log_file` begins with: logs are kept apart from files, and read like them.
LOG_PREFIX = "log:run-"


def result_files(events: Iterable[EventRecord]) -> list[dict[str, str]]:
    """`{path, file}` of each result that the events name, by path; of equal paths the last one."""
    files: dict[str, str] = {}
    for event in events:
        path, file = event.data.get("path"), event.data.get("file")
        if isinstance(path, str) and isinstance(file, str):
            files[path] = file
    return [{"path": path, "file": file} for path, file in sorted(files.items())]


def write_results(backend: Backend, events: Iterable[EventRecord], target: Path) -> list[Path]:
    """Write each file of the events that have `file` and `path`; of equal paths the last one.

    Returns:
        What was written, below `target` as it was given.

    Raises:
        InvalidInputError: A path leaves `target`; nothing was written. Or one cannot be written.
    """
    files, whole = dict[Path, str](), target.resolve()
    for event in events:
        file_id, path = event.data.get("file"), event.data.get("path")
        if isinstance(file_id, str) and isinstance(path, str):
            place = inside(target, path, "a result file: the path")
            files[target / place.relative_to(whole)] = file_id
    return [path for path, file_id in files.items() if _write(backend, file_id, path)]


def write_log(
    backend: Backend, run: RunRecord, target: Path, results: Collection[Path], *, is_last: bool
) -> list[Path]:
    """Write what an attempt has printed: `log.txt` of a job's last one; `log-attempt-2.txt` of
    another one, and where the job itself has left a `log.txt`.

    Args:
        results: What was written into `target` before, and is kept.

    Returns:
        What was written.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    names = ["log.txt"] * is_last + [f"log-attempt-{run.attempt}.txt"]
    free = [target / name for name in names if target / name not in results]
    return [write_chunks(read_log_chunks(backend, run.id), path) for path in free[:1]]


def write_chunks(chunks: Iterable[bytes], path: Path) -> Path:
    """Write a file piece by piece, completely or not at all.

    Raises:
        InvalidInputError: It cannot be written there.
    """
    with _writing(path) as out:
        out.writelines(chunks)
    return path


def write_table(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """As `write_chunks`, of JSON lines."""
    return write_chunks(((json_text(row) + "\n").encode() for row in rows), path)


def read_log_chunks(backend: Backend, run_id: int, offset: int = 0) -> Iterator[bytes]:
    """The log from `offset` to its present end."""
    while chunk := backend.read_log(run_id, offset):
        yield chunk
        offset += len(chunk)


def write_stream_to(backend: Backend, file_id: str, path: Path) -> None:
    """Write a stored file to `path`, completely or not at all.

    Raises:
        InvalidInputError: It cannot be written there.
        NotFoundError: There is no file of that id.
    """
    with backend.open_file(file_id) as content, _writing(path) as out:
        shutil.copyfileobj(content, out, 1 << 20)


@contextmanager
def _writing(path: Path) -> Generator[BinaryIO]:
    """A file that is `path` once all is in it; makes its folder, and names `path` in what goes
    wrong.
    """
    # Not named after the file, whose name may be as long as names can be.
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as out:
                yield out
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInputError(f"cannot write {str(path):.300}: {error.strerror}") from error


def _write(backend: Backend, file_id: str, path: Path) -> bool:
    try:
        write_stream_to(backend, file_id, path)
    except NotFoundError:
        logger.warning("%s is no longer in the store; %s is left out", file_id, path.name)
        return False
    return True
