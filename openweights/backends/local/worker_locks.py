"""Tells at once whether a worker on this machine lives: it holds a lock that dies with it.

A worker takes an exclusive `flock` on its own file and hands the descriptor down to the processes
that it starts. The kernel drops the lock when the last of them is gone, however they ended, so
nobody waits for a lease when a worker is killed, and no job is given away while a process of its
old run still exists.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from openweights.errors import InvalidInputError, InvalidStateError

WORKER_LOCK = "embedded-worker.lock"  # held by the worker for jobs, below the home
ASKED_TO_END = "asked to end"  # what it writes there when nobody is to take its place
_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
# Another process that looks whether a lock is held blocks it for a moment.
_PATIENCE_S = 1.0


class WorkerLocks:
    """The lock files of one store's workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[str, int] = {}

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors of the locks that this object holds; inheritable."""
        return tuple(self._fds.values())

    def take(self, worker_id: str) -> bool:
        """Hold the worker's lock from now on; False when this object holds it already.

        Raises:
            InvalidStateError: Processes of another worker of that id are alive.
        """
        path = self._path(worker_id)
        if worker_id in self._fds:
            if _is_file_at(self._fds[worker_id], path):
                return False
            os.close(self._fds.pop(worker_id))  # the store was deleted meanwhile
        give_up_at = time.monotonic() + _PATIENCE_S
        while (fd := self._try_exclusive(path, os.O_CREAT)) is None:
            if time.monotonic() > give_up_at:
                raise InvalidStateError(
                    f"a worker with the id {worker_id!r} is alive: wait until it has ended, or "
                    "take another id"
                )
            time.sleep(0.01)
        os.set_inheritable(fd, True)
        self._fds[worker_id] = fd
        return True

    def is_held(self, worker_id: str) -> bool:
        """Whether a process of the worker is alive."""
        return is_locked(self._path(worker_id))

    def release(self, worker_id: str) -> None:
        """Let go of the lock, and remove its file unless child processes still hold it."""
        fd = self._fds.pop(worker_id, None)
        if fd is not None:
            os.close(fd)
        self.remove(worker_id)

    def remove(self, worker_id: str) -> None:
        """Remove the file of a worker that has ended; nothing happens while it is held."""
        path = self._path(worker_id)
        fd = self._try_exclusive(path, 0)
        if fd is not None:
            # Only who holds this lock removes this path, so it is still the file that was opened.
            path.unlink()
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def sweep(self, keep: Collection[str]) -> None:
        """Remove the files of all ended workers except `keep`."""
        for path in self._folder.glob("*.lock"):
            if path.stem not in keep and path.stem not in self._fds:
                self.remove(path.stem)

    def close(self) -> None:
        """Let go of all locks."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _path(self, worker_id: str) -> Path:
        if not _VALID_ID.fullmatch(worker_id):
            raise InvalidInputError(
                f"{worker_id!r} cannot be a worker's id: use letters, digits and . _ : -"
            )
        return self._folder / f"{worker_id}.lock"

    def _try_exclusive(self, path: Path, flags: int) -> int | None:
        """Descriptor with the exclusive lock on the file at `path`, or None."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except FileNotFoundError:
            return None
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed, or replaced, between open and lock.
            if _is_file_at(fd, path):
                return fd
        os.close(fd)
        return None


def has_lost_its_worker(home: Path) -> bool:
    """Whether the self-started worker of a store has gone, and was not asked to."""
    lock = home / WORKER_LOCK
    return lock.exists() and not is_locked(lock) and lock.read_text() != ASKED_TO_END


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file or folder."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that several processes can look at the same time.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    finally:
        os.close(fd)


def _is_file_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
