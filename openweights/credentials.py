"""What `ow login` stores: a project's address and keys, in a file that only its owner can read."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from openweights.errors import ConfigurationError


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
    import json

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
    import json

    path = credentials_path(home)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    # Nobody else may read it, from the first moment.
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(credentials), file, indent=2)
    new.replace(path)
    return path


def delete_credentials(home: Path) -> bool:
    """Whether there were any."""
    try:
        credentials_path(home).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
