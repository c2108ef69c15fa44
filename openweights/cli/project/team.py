"""What the commands about an organization share: its project, and asking for what is secret."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from openweights.errors import ConfigurationError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.base import TeamStore


@contextmanager
def open_team() -> Generator[TeamStore]:
    """The project that the environment or `ow login` names, closed afterwards.

    Raises:
        ConfigurationError: The store is the one on this machine, which has no organizations.
    """
    settings = Settings.from_env()
    from openweights.backends import open_backend

    with closing(open_backend(settings)) as backend:
        if backend.team is None:
            raise ConfigurationError(
                "this needs a Supabase project, and the store in use is the one on this machine "
                f"({settings.home}): log in with `ow login`, or set SUPABASE_URL, "
                "SUPABASE_ANON_KEY and OPENWEIGHTS_API_KEY"
            )
        yield backend.team


def ask_secret(prompt: str) -> str:
    """What is typed without being shown, or comes from standard input when that is no terminal."""
    if sys.stdin is None:
        raise click.UsageError(f"{prompt}: there is nobody to ask, and no standard input")
    if sys.stdin.isatty():
        return click.prompt(prompt, hide_input=True, err=True)
    # Not from a terminal that the process may have besides: the pipe is what was meant.
    text = sys.stdin.buffer.read().decode(errors="surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")
