"""Every error that this package raises on purpose.

    OpenWeightsError
    ├── InvalidInputError (ValueError)       what you passed cannot work: where, and what would
    │   ├── DatasetError                     a row of a file, named by line and field
    │   └── ConfigError                      a parameter, named by field
    ├── NotFoundError (LookupError)          no job, run, file or worker of that id
    ├── InvalidStateError (RuntimeError)     not in this state, such as cancel of a completed job
    ├── ConfigurationError (RuntimeError)    this installation lacks a package, a key, a setting
    ├── JobFailedError (RuntimeError)        your job failed; the platform did its part
    │   └── JobCanceledError
    ├── WaitTimeoutError (TimeoutError)      the job goes on; waiting for it was limited
    └── PlatformError (RuntimeError)         the store or a worker failed; your job may be fine
        ├── StoreUnavailableError            worth trying again
        └── FencedError                      a newer attempt has taken over; stop quietly

Each class also inherits the built-in that code unaware of this package would catch.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class OpenWeightsError(Exception):
    """Root of the tree."""


class InvalidInputError(OpenWeightsError, ValueError):
    """What the caller passed cannot work."""


class DatasetError(InvalidInputError):
    """A dataset file holds rows that cannot be used; the message lists line, field and remedy."""


class ConfigError(InvalidInputError):
    """A job's parameters are wrong; the message lists field and remedy."""


class NotFoundError(OpenWeightsError, LookupError):
    """Nothing has that id."""


class InvalidStateError(OpenWeightsError, RuntimeError):
    """The job's or run's status does not allow this."""


class ConfigurationError(OpenWeightsError, RuntimeError):
    """This installation lacks something: a package, a key, a setting."""


class JobFailedError(OpenWeightsError, RuntimeError):
    """The job itself failed."""


class JobCanceledError(JobFailedError):
    """The job was canceled."""


class WaitTimeoutError(OpenWeightsError, TimeoutError):
    """The job had not ended when the caller's patience did. It goes on."""


class PlatformError(OpenWeightsError, RuntimeError):
    """The store or a worker failed, not the job."""


class StoreUnavailableError(PlatformError):
    """The store cannot be reached now; trying again may work."""


class FencedError(PlatformError):
    """The run is no longer the current attempt of its job: nothing was written."""


_SHOWN = 60  # characters of a wrong value
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def wants_room(error: BaseException) -> bool:
    """Whether the system refused to write for want of room: disk, quota, or the largest file."""
    return isinstance(error, OSError) and error.errno in _FULL


def spelled(values: Iterable[object]) -> str:
    """`'a', 'b' or 'c'`."""
    names = [repr(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def shown(value: object) -> str:
    """The value as code, cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def in_a_line(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` was probably meant to be: one like it, or, as `lr` of
    `learning_rate`, one whose words begin with its letters.
    """
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    short = [whole for whole in known if len(name) > 1 and _initials(whole) == name.lower()]
    return next(iter([*near, *short]), None)


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.lower().split("_"))
