"""The folders of a store: content of files, each under a name that follows from its bytes, and logs
of runs, one growing file each.

Content is written under a temporary name, brought to the disk and renamed, so that a crash at any
moment leaves either the whole file or none under its final name.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from openweights.backends.values import check_purpose
from openweights.errors import InvalidInputError

_CHUNK_BYTES = 1 << 20
_INCOMING = "incoming"
_ABANDONED_AFTER_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Incoming:
    """Content that is on the disk but not yet under its final name."""

    path: Path
    file_id: str
    sha256: str
    bytes: int


class FileFolder:
    """The folder `files` of a store."""

    def __init__(self, folder: Path, organization_id: str) -> None:
        self._folder = folder
        self._organization_id = organization_id

    def receive(self, content: BinaryIO, purpose: str) -> Incoming:
        """Copy a stream to the disk and compute its id. The caller adopts or discards it."""
        check_purpose(purpose)
        folder = self._folder / _INCOMING
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder)
        try:
            with open(fd, "wb") as target:
                digest, size = self._copy(content, target)
        except BaseException:
            os.unlink(name)
            raise
        file_id = f"{purpose}:file-{digest[:12]}"
        return Incoming(Path(name), file_id, digest, size)

    def adopt(self, incoming: Incoming) -> None:
        """Give received content its final name, for good."""
        path = self.path(incoming.file_id)
        path.parent.mkdir(exist_ok=True)
        os.replace(incoming.path, path)
        _sync_folder(path.parent)

    def discard(self, incoming: Incoming) -> None:
        """Drop received content, unless it was adopted."""
        incoming.path.unlink(missing_ok=True)

    def remove(self, file_id: str) -> None:
        """Remove content; nothing happens when there is none."""
        self.path(file_id).unlink(missing_ok=True)

    def contents(self) -> dict[str, int]:
        """Id -> bytes, of all content that is here."""
        found: dict[str, int] = {}
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*_file-*"):
            purpose, _, digest = path.name.rpartition("_file-")
            with suppress(FileNotFoundError):
                found[f"{purpose}:file-{digest}"] = path.stat().st_size
        return found

    def path(self, file_id: str) -> Path:
        """Where the content of a file lies."""
        digest = file_id.rpartition("-")[2]
        return self._folder / digest[:2] / file_id.replace(":", "_")

    def sweep(self) -> None:
        """Remove what processes that were killed while they uploaded have left."""
        for path in (self._folder / _INCOMING).glob("*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                    path.unlink()

    def _copy(self, content: BinaryIO, target: BinaryIO) -> tuple[str, int]:
        digest = hashlib.sha256()
        size = 0
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
            size += len(chunk)
        target.flush()
        os.fsync(target.fileno())
        digest.update(self._organization_id.encode())
        return digest.hexdigest(), size


class LogFolder:
    """The folder `logs` of a store; written by offset, so that sending twice changes nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, run_id: int) -> int:
        """Bytes stored so far."""
        try:
            return os.stat(self._path(run_id)).st_size
        except FileNotFoundError:
            return 0

    def write(self, run_id: int, offset: int, data: bytes) -> None:
        """Put `data` at `offset`, which is at most the log's size."""
        fd = os.open(self._path(run_id), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if not 0 <= offset <= size:
                raise InvalidInputError(
                    f"offset {offset} is not within the log of run {run_id}, which has {size} "
                    "bytes: send what is missing first"
                )
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(fd)

    def read(self, run_id: int, offset: int, limit: int) -> bytes:
        """At most `limit` bytes from `offset`."""
        try:
            with open(self._path(run_id), "rb") as file:
                # A file system has a largest place, and refuses to seek beyond it.
                file.seek(min(offset, os.fstat(file.fileno()).st_size))
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def replace(self, run_id: int, text: bytes) -> None:
        """Put `text` in the log's place; who reads the log meanwhile goes on reading it."""
        new = f"{self._path(run_id)}.new"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(text)
        os.replace(new, self._path(run_id))

    def remove(self, run_id: int) -> None:
        """Remove the log; nothing happens when there is none."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(run_id))

    def newest(self) -> int:
        """The highest number of a run that has a log; 0 without any."""
        names = (name.removesuffix(".log") for name in os.listdir(self._folder))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def total(self) -> int:
        """Bytes of all logs."""
        sizes = 0
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                sizes += entry.stat().st_size
        return sizes

    def _path(self, run_id: int) -> str:
        return f"{self._folder}/{int(run_id)}.log"


def _sync_folder(folder: Path) -> None:
    # Without this a rename may be lost in a power cut although the file's content is not.
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
