"""The folder in which a job runs: made, filled, and removed also when its worker was killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import BinaryIO

from openweights.errors import InvalidInputError, PlatformError
from openweights.paths import inside
from openweights.worker.process import kill_strays

logger = logging.getLogger(__name__)

SPOOL = ".spool"
UPLOADS = "uploads"
SPOOL_VARIABLE = "OPENWEIGHTS_SPOOL"
LOCK_WAIT_S = 10.0


class RunFolder:
    """A fresh folder under `root`, with `uploads/` and a spool, locked for as long as its run has
    processes.

    Attributes:
        lock_fd: For the guard to inherit: while it is open anywhere, nobody sweeps the folder away.
    """

    def __init__(self, root: Path, run_id: int) -> None:
        """Make it.

        Raises:
            PlatformError: Processes of an earlier run with this folder are still there.
        """
        self.path = root / str(run_id)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_WAIT_S
        while (lock_fd := self._make()) is None:
            if time.monotonic() > deadline:
                raise PlatformError(f"{self.path} is in use by another process")
            sweep_one(self.path)
            time.sleep(0.05)
        self.lock_fd = lock_fd
        try:
            (self.path / UPLOADS).mkdir()
            (self.path / SPOOL).mkdir()
        except OSError:
            self.remove()
            raise

    def check_is_here(self) -> None:
        """Raise InvalidInputError when the job has replaced its own folder: what lies there now
        may be anybody's.
        """
        if self.path.is_symlink() or not _is_same(self.lock_fd, self.path):
            raise InvalidInputError("the job has moved or replaced its own folder")

    @property
    def uploads(self) -> Path:
        return self.path / UPLOADS

    @property
    def spool(self) -> Path:
        return self.path / SPOOL

    @property
    def marker(self) -> str:
        """What every process of the run has in its environment and no other process has."""
        return marker_of(self.path)

    def remove(self) -> None:
        """Remove it with everything in it; of a link that took its place, the link."""
        _remove_tree(self.path)
        os.close(self.lock_fd)

    def _make(self) -> int | None:
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            return None
        lock_fd = _lock(self.path)
        # A sweeper may have locked and removed it between the two lines above.
        if lock_fd is not None and not _is_same(lock_fd, self.path):
            os.close(lock_fd)
            return None
        return lock_fd


def marker_of(path: Path) -> str:
    return f"{SPOOL_VARIABLE}={path / SPOOL}"


def sweep(root: Path) -> None:
    """Remove folders of runs whose worker and guard are gone, and kill what is left of them."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(root)):
            if entry.is_dir(follow_symlinks=False):
                sweep_one(Path(entry.path))


def sweep_one(path: Path) -> None:
    lock_fd = _lock(path)
    if lock_fd is None:
        return
    try:
        killed = kill_strays(marker_of(path))
        logger.warning("removing %s of a worker that is gone, %s processes killed", path, killed)
        _remove_tree(path)
    finally:
        os.close(lock_fd)


def unpack(bundle: BinaryIO, folder: Path) -> None:
    """Unpack a zip into `folder`.

    Raises:
        InvalidInputError: It is not a zip, is damaged, or has a member that leaves the folder.
    """
    with tempfile.TemporaryFile(dir=folder) as seekable:
        shutil.copyfileobj(bundle, seekable)
        try:
            with zipfile.ZipFile(seekable) as archive:
                for name in archive.namelist():
                    inside(folder, name, "the source bundle: the name")
                archive.extractall(folder)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
            message = f"the source bundle is not a readable zip: {error}"
            raise InvalidInputError(message) from error


def mount(content: BinaryIO, folder: Path, target: str) -> None:
    """Write a mounted file to its target. One that begins with `#!` is made executable.

    Raises:
        InvalidInputError: The target leaves the folder.
    """
    path = inside(folder, target, "the target")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("wb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise InvalidInputError(
            f"the target {target!r} is both a file and a folder: mount it under another name"
        ) from None
    with opened as file:
        beginning = content.read(2)
        file.write(beginning)
        shutil.copyfileobj(content, file)
    if beginning == b"#!":
        path.chmod(path.stat().st_mode | 0o111)


def _lock(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # a job may have taken the write permission of its own folders
        for folder, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        logger.warning("%s could not be removed", path)
