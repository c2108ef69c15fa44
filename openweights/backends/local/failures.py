"""Turns what SQLite and the file system raise into this package's errors, with what to do."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from openweights.errors import (
    ConfigurationError,
    InvalidInputError,
    OpenWeightsError,
    PlatformError,
    StoreUnavailableError,
    wants_room,
)

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@contextmanager
def clear_errors(home: Path) -> Generator[None, None, None]:
    """Raise errors of this package from those of SQLite and the operating system, and from what
    SQLite cannot hold: half characters, and numbers of more than 64 bits.
    """
    try:
        yield
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidInputError(f"the store cannot hold this: {error}") from error
    except sqlite3.Error as error:
        raise _from_sqlite(error, home) from error
    except OSError as error:
        if isinstance(error, OpenWeightsError):
            raise
        raise _from_os(error, home) from error


def _from_sqlite(error: sqlite3.Error, home: Path) -> OpenWeightsError:
    # Extended codes hold the primary one in their low byte.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnavailableError(
            f"the store in {home} is busy: another process has been writing for too long; try again"
        )
    if code == sqlite3.SQLITE_FULL:
        return _full(home)
    if code in _DAMAGED:
        return PlatformError(
            f"{home / 'openweights.db'} is damaged ({error}): restore it from a backup, or move it "
            "away together with its -wal and -shm files to start with an empty store"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return _forbidden(home, error)
    if code == sqlite3.SQLITE_IOERR:
        return StoreUnavailableError(
            f"reading or writing the store in {home} failed ({error}): check that the disk works "
            "and has space, and that the folder was not moved"
        )
    return PlatformError(f"the store in {home} failed: {error}")


def _from_os(error: OSError, home: Path) -> OpenWeightsError:
    if wants_room(error):
        return _full(home)
    if error.errno in _FORBIDDEN:
        return _forbidden(home, error)
    return StoreUnavailableError(
        f"the store in {home} failed ({error}): see that the folder is there, or can be "
        "made, or set OPENWEIGHTS_HOME to another one"
    )


def _full(home: Path) -> OpenWeightsError:
    return StoreUnavailableError(
        f"no space left for the store in {home}: free some, or set OPENWEIGHTS_HOME to a folder on "
        "another disk"
    )


def _forbidden(home: Path, error: Exception) -> OpenWeightsError:
    return ConfigurationError(
        f"cannot write to {home} ({error}): make it a folder that you may write to, or set "
        "OPENWEIGHTS_HOME to one"
    )
