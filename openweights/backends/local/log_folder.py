"""Logs of runs: one growing file each, written by offset so that sending twice changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from openweights.errors import InvalidInputError


class LogFolder:
    """The folder `logs` of a store."""

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
                file.seek(offset)
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def _path(self, run_id: int) -> str:
        return f"{self._folder}/{int(run_id)}.log"
