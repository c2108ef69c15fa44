"""`ow.files`: content-addressed files. Datasets are checked, completely, before they are stored."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict, cast

from openweights.client.datasets import CHECKED_PURPOSES, check_dataset
from openweights.client.results import write_stream_to
from openweights.errors import DatasetError, InvalidInputError
from openweights.types import FileRecord

if TYPE_CHECKING:
    from openweights.client import OpenWeights

_PURPOSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_IN_MEMORY = 8 << 20


class File(TypedDict):
    """A stored file. `created_at` is ISO 8601; `object` is always "file"."""

    id: str
    object: str
    bytes: int
    created_at: str
    filename: str
    purpose: str


class FileCollection:
    """The organization's files."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow

    def upload(self, path: str | os.PathLike[str], purpose: str) -> File:
        """Check and store the file at `path`. Of the path only the base name is kept.

        Args:
            purpose: `conversations` and `preference` are checked as datasets; anything else is
                stored as it is.

        Raises:
            DatasetError: Rows cannot be used; the message names line, field and remedy of each.
            InvalidInputError: There is no such file.
        """
        return self.create(Path(path), purpose)

    def create(self, file: str | os.PathLike[str] | BinaryIO | bytes, purpose: str) -> File:
        """As `upload`, from a path, an open binary file, or bytes."""
        _check_purpose(purpose)
        with _open_binary(file) as (content, name):
            if purpose in CHECKED_PURPOSES:
                start = content.tell()
                check_dataset(content, purpose, name)
                content.seek(start)
            return _as_dict(self._ow.backend.put_file(content, purpose, name))

    def validate(self, file: str | os.PathLike[str] | BinaryIO | bytes, purpose: str) -> bool:
        """Whether `upload` would take the file."""
        if purpose not in CHECKED_PURPOSES:
            return True
        with _open_binary(file) as (content, name):
            start = content.tell()
            try:
                check_dataset(content, purpose, name)
            except DatasetError:
                return False
            finally:
                content.seek(start)
        return True

    def retrieve(self, file_id: str) -> File:
        """What is known of the file.

        Raises:
            NotFoundError: There is none of that id.
        """
        return _as_dict(self._ow.backend.get_file(file_id))

    def get_by_id(self, file_id: str) -> File:
        """`retrieve` under its older name."""
        return self.retrieve(file_id)

    def list(self, purpose: str | None = None, limit: int | None = 100) -> list[File]:
        """The newest `limit` (None: all), newest first."""
        return [
            _as_dict(record) for record in self._ow.backend.list_files(purpose=purpose, limit=limit)
        ]

    def content(self, file_id: str) -> bytes:
        """All of the file, in memory; `download` writes large ones to disk."""
        with self._ow.backend.open_file(file_id) as stream:
            return stream.read()

    def download(self, file_id: str, path: str | os.PathLike[str]) -> Path:
        """Write the file to `path`, completely or not at all.

        Raises:
            InvalidInputError: Nothing can be written there.
            NotFoundError: There is no file of that id.
        """
        target = Path(path)
        write_stream_to(self._ow.backend, file_id, target)
        return target

    def delete(self, file_id: str) -> None:
        """Remove the file. One that is not there is no error."""
        self._ow.backend.delete_file(file_id)


def _as_dict(record: FileRecord) -> File:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at.isoformat(),
        "filename": record.filename,
        "purpose": record.purpose,
    }


def _check_purpose(purpose: object) -> None:
    if not isinstance(purpose, str) or not _PURPOSE.fullmatch(purpose):
        raise InvalidInputError(
            f"purpose: {purpose!r} is no purpose; use 'conversations', 'preference' or a word"
        )


@contextmanager
def _open_binary(file: object) -> Generator[tuple[BinaryIO, str]]:
    """A seekable binary stream and its base name; what was opened here is closed."""
    if isinstance(file, str | os.PathLike):
        path = Path(cast("str", file)).expanduser()
        with _open_path(path) as stream:
            yield stream, path.name
    elif isinstance(file, bytes):
        yield BytesIO(file), "data"
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


def _open_path(path: Path) -> BinaryIO:
    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder; pass a file")
    if os.path.exists(path) and not path.is_file():
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
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from error


def _checked_stream(file: object) -> BinaryIO:
    if not callable(getattr(file, "read", None)):
        raise InvalidInputError(
            f"a {type(file).__name__} is no file; pass a path or an open binary file"
        )
    stream = cast("BinaryIO", file)
    if not isinstance(cast("object", stream.read(0)), bytes):
        raise InvalidInputError("the file is open in text mode; open it with mode 'rb'")
    return stream
