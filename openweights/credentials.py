"""Secrets below `OPENWEIGHTS_HOME`, in files that only their owner can read: a project's address
and keys, which `ow login` stores, and what clients hand to their jobs on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from openweights.errors import ConfigurationError

_HANDED = "handed-over"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A project, and a key of an organization in it."""

    supabase_url: str
    supabase_anon_key: str = field(repr=False)
    api_key: str = field(repr=False)


def credentials_path(home: Path) -> Path:
    """The file, below `OPENWEIGHTS_HOME`."""
    return home / "credentials.json"


def read_credentials(home: Path) -> Credentials | None:
    """What is stored; None before `ow login`.

    Raises:
        ConfigurationError: The file cannot be read, or holds something else.
    """
    path = credentials_path(home)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        values = cast("dict[str, str]", found)
        return Credentials(**{name: str(value) for name, value in values.items()})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError):
        # What it holds is not shown: it may be a key.
        raise ConfigurationError(f"{path} is damaged: `ow login` writes it anew") from None


def write_credentials(home: Path, credentials: Credentials) -> Path:
    """Store them; raises OSError."""
    return write_private(credentials_path(home), json.dumps(asdict(credentials), indent=2))


def write_private(path: Path, text: str) -> Path:
    """Write a file that nobody else may read, completely or not at all, and return its path; makes
    its folder, and raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    # With its rights from the first moment.
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)
    return path


def delete_credentials(home: Path) -> bool:
    """Whether there were any."""
    try:
        credentials_path(home).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ---- what jobs are handed ------------------------------------------------------------------------


def hand_over(home: Path, job_id: str, variables: Mapping[str, str]) -> None:
    """Keep variables for a job of the store on this machine, whose worker has the environment of
    whoever started it; raises OSError. Nothing is kept of none.
    """
    path = _handed_path(home, job_id)
    if variables:
        write_private(path, json.dumps({"job": job_id, "variables": dict(variables)}))
    else:
        path.unlink(missing_ok=True)


def handed_over(home: Path, job_id: str) -> dict[str, str]:
    """What a job was handed; raises OSError."""
    try:
        found: Any = json.loads(_handed_path(home, job_id).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {str(name): str(value) for name, value in found["variables"].items()}


def jobs_with_handed_over(home: Path) -> list[str]:
    """Jobs for which something is kept."""
    found: list[str] = []
    for path in (home / _HANDED).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(str(json.loads(path.read_text(encoding="utf-8"))["job"]))
    return found


def _handed_path(home: Path, job_id: str) -> Path:
    # An id may hold what no file's name can.
    return home / _HANDED / f"{hashlib.sha256(job_id.encode()).hexdigest()[:24]}.json"
