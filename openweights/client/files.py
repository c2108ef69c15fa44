"""`ow.files`: content-addressed files. Datasets are checked, completely, before they are stored."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NotRequired, TypedDict, cast, get_args

from openweights.arguments import as_path, check_limit, check_text
from openweights.client.datasets import CHECKED_PURPOSES, ROWS_NAME, check_dataset
from openweights.client.results import LOG_PREFIX, read_log_chunks, write_chunks, write_stream_to
from openweights.client.watching.notes import tell
from openweights.errors import DatasetError, InvalidInputError, NotFoundError, closest, shown
from openweights.json_values import as_written
from openweights.types import FileRecord

if TYPE_CHECKING:
    from openweights.client import OpenWeights

logger = logging.getLogger(__name__)

# Other words for the same.
_OTHER_WORDS = {"fine-tune": "conversations", "preferences": "preference"}
_IN_MEMORY = 8 << 20


# Rows: dicts, such as the list of them or a `datasets.Dataset` gives.
Rows = Sequence[Mapping[str, Any]]
Content = str | os.PathLike[str] | BinaryIO | bytes | Rows
Purpose = Literal[
    "conversations",
    "preference",
    "multiple_choice",
    "fine-tune",
    "preferences",
    "custom_job_file",
    "source",
    "result",
    "checkpoint",
    "event",
    "log",
    "logs",
    "logp",
    "logp_blockwise",
    "logprobs",
    "samples",
]


class File(TypedDict):
    """A stored file. `created_at` is ISO 8601; `object` is always "file". What `upload` gives for a
    dataset has `holds`: its rows and tokens and what of them is learned, in words.
    """

    id: str
    object: str
    bytes: int
    created_at: str
    filename: str
    purpose: str
    holds: NotRequired[str]


PURPOSES: tuple[str, ...] = get_args(Purpose)


class FileCollection:
    """The organization's files."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow
        self._told: set[str] = set()  # files whose contents were said

    def upload(self, path: str | os.PathLike[str] | Rows, purpose: Purpose | None = None) -> File:
        """Check and store a file, and say what it holds: on a terminal, in the log, and as `holds`
        of the answer. Of its path only the base name is kept.

        Args:
            path: The file; or a list of rows, or a `datasets.Dataset`, instead of one.
            purpose: Must be given. `conversations`, `preference` and `multiple_choice` are checked
                as datasets; anything else is stored as it is.

        Raises:
            DatasetError: Rows cannot be used; the message names line, field and remedy of each.
            InvalidInputError: There is no such file.
        """
        return self.create(path, purpose)

    def create(self, file: Content, purpose: str | None = None, *, name: str | None = None) -> File:
        """As `upload`, from a path, an open binary file, or bytes; `name` in place of its own."""
        purpose = _purpose(purpose)
        with _open_binary(file) as (content, own_name):
            name = name or own_name
            if purpose not in CHECKED_PURPOSES:
                return _as_dict(self._ow.backend.put_file(content, purpose, name))
            start = content.tell()
            found = check_dataset(content, purpose, name)
            content.seek(start)
            stored = _as_dict(self._ow.backend.put_file(content, purpose, name))
        if stored["id"] not in self._told:
            self._told.add(stored["id"])
            tell(logger, f"{name}: {found.words()}")
        return {**stored, "holds": found.words()}

    def validate(self, file: Content, purpose: str | None = None) -> bool:
        """Whether `upload` would take the file.

        Raises:
            InvalidInputError: There is no such file.
        """
        purpose = _purpose(purpose)
        try:
            with _open_binary(file) as (content, name):
                start = content.tell()
                try:
                    if purpose in CHECKED_PURPOSES:
                        check_dataset(content, purpose, name)
                finally:
                    content.seek(start)
        except DatasetError:
            return False
        return True

    def retrieve(self, file_id: str) -> File:
        """What is known of the file.

        Raises:
            NotFoundError: There is none of that id.
        """
        return _as_dict(self._ow.backend.get_file(_checked_id(file_id)))

    def get_by_id(self, file_id: str) -> File:
        """`retrieve` under its older name."""
        return self.retrieve(file_id)

    def list(self, purpose: str | None = None, limit: int | None = 100) -> list[File]:
        """The newest `limit` (None: all), newest first.

        Raises:
            InvalidInputError: No file has such a purpose.
        """
        if purpose is not None:
            purpose = _purpose(purpose)
        found = self._ow.backend.list_files(purpose=purpose, limit=check_limit(limit))
        return [_as_dict(record) for record in found]

    def content(self, file_id: str) -> bytes:
        """All of the file, in memory; `download` writes large ones to disk. `run.log_file` will do,
        too.
        """
        if _checked_id(file_id).startswith(LOG_PREFIX):
            return b"".join(self._log(file_id))
        with self._ow.backend.open_file(file_id) as stream:
            return stream.read()

    def download(self, file_id: str, path: str | os.PathLike[str]) -> Path:
        """Write the file to `path`, completely or not at all.

        Raises:
            InvalidInputError: Nothing can be written there.
            NotFoundError: There is no file or log of that id.
        """
        target = as_path("path", path)
        if _checked_id(file_id).startswith(LOG_PREFIX):
            return write_chunks(self._log(file_id), target)
        write_stream_to(self._ow.backend, file_id, target)
        return target

    def _log(self, file_id: str) -> Iterator[bytes]:
        number = file_id.removeprefix(LOG_PREFIX)
        if not re.fullmatch("[0-9]{1,18}", number):
            raise NotFoundError(f"{shown(file_id)} is no log; `run.log_file` names one")
        return read_log_chunks(self._ow.backend, int(number))

    def delete(self, file_id: str) -> None:
        """Remove the file. One that is not there is no error."""
        self._ow.backend.delete_file(_checked_id(file_id))


def _checked_id(file_id: object) -> str:
    return check_text("file_id", file_id, "`ow.files.list()` lists files with their ids")


def _as_dict(record: FileRecord) -> File:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at.isoformat(),
        "filename": record.filename,
        "purpose": record.purpose,
    }


def _purpose(given: object) -> str:
    if given is None:
        raise InvalidInputError(
            "purpose: is missing; say what the file holds, as purpose='conversations': "
            f"'conversations', 'preference' or 'multiple_choice' for rows, or {PURPOSES[5]!r}"
        )
    purpose = _OTHER_WORDS.get(given, given) if isinstance(given, str) else given
    if not isinstance(purpose, str) or purpose not in PURPOSES:
        near = closest(purpose, PURPOSES) if isinstance(purpose, str) else None
        meant = f"did you mean {near!r}?" if near else f"use one of {', '.join(PURPOSES[:4])}"
        raise InvalidInputError(f"purpose: nothing reads {shown(given)}; {meant}")
    return purpose


@contextmanager
def _open_binary(file: object) -> Generator[tuple[BinaryIO, str]]:
    """A seekable binary stream and its base name; what was opened here is closed."""
    if isinstance(file, str | os.PathLike):
        path = _expanded(as_path("file", cast("object", file)))
        with _open_path(path) as stream:
            yield stream, path.name
    elif isinstance(file, bytes):
        yield BytesIO(file), "data"
    elif (rows := _rows(file)) is not None:
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as spool:
            for number, row in enumerate(rows, start=1):
                spool.write(as_written(row, f"row {number}").encode() + b"\n")
            if not spool.tell():
                raise DatasetError("the list holds no rows; give it a dict for each row")
            spool.seek(0)
            yield cast("BinaryIO", spool), ROWS_NAME
    else:
        stream = _checked_stream(file)
        name = getattr(stream, "name", None)
        base = os.path.basename(name) if isinstance(name, str) else "data"
        if stream.seekable():
            yield stream, base
            return
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as spool:
            shutil.copyfileobj(stream, spool, 1 << 20)
            spool.seek(0)
            yield cast("BinaryIO", spool), base


def _rows(file: object) -> Iterable[object] | None:
    """The rows of a list, or of a `datasets.Dataset`, which is known by its columns."""
    if isinstance(file, list | tuple):
        return cast("Sequence[object]", file)
    if not hasattr(file, "column_names"):
        return None
    if isinstance(file, Mapping):
        splits = ", ".join(map(repr, cast("Mapping[str, object]", file)))
        raise InvalidInputError(f"a dataset of several splits is no file; pass one of {splits}")
    return cast("Iterable[object]", file)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # nobody has that name, and the file's may begin so
        return path


def _open_path(path: Path) -> BinaryIO:
    if os.path.isdir(path):
        raise InvalidInputError(f"{path} is a folder; pass a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InvalidInputError(
            f"{path} is a pipe or a device, not a file; open it, and pass it to ow.files.create"
        )
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InvalidInputError(
            f"there is no file {str(path)!r} (looked at {path.absolute()})"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"cannot read {str(path):.300}: {error.strerror}") from error


def _checked_stream(file: object) -> BinaryIO:
    if not callable(getattr(file, "read", None)):
        raise InvalidInputError(
            f"a {type(file).__name__} is no file; pass a path, a list of rows (each a dict), a "
            "datasets.Dataset, or an open binary file"
        )
    stream = cast("BinaryIO", file)
    if not isinstance(cast("object", stream.read(0)), bytes):
        raise InvalidInputError("the file is open in text mode; open it with mode 'rb'")
    return stream
