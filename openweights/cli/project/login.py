"""`ow login`, `ow logout` and `ow whoami`."""

from __future__ import annotations

import re
import sys
from contextlib import closing

import click

from openweights.cli.output import json_option, note, print_fields, print_json
from openweights.cli.project.team import ask_secret, open_team
from openweights.credentials import (
    Credentials,
    credentials_path,
    delete_credentials,
    write_credentials,
)
from openweights.errors import InvalidInputError
from openweights.settings import Settings, home_folder

_ON_THIS_MACHINE = re.compile(r"http://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:|/|$)")
_IDENTITY = (
    *("organization", "organization_id", "email", "role", "key_name", "key_id", "worker_id"),
    "expires_at",
)


@click.command()
@click.option(
    "--url", envvar="SUPABASE_URL", metavar="URL", help="Of the project.  [env: SUPABASE_URL]"
)
@click.option(
    "--anon-key",
    envvar="SUPABASE_ANON_KEY",
    metavar="KEY",
    help="The project's public key.  [env: SUPABASE_ANON_KEY]",
)
def login(url: str | None, anon_key: str | None) -> None:
    """Store a project's address and your key here.

    The key, ow_…, is asked for, or read from standard input; it is checked first. It is stored in
    `credentials.json` below OPENWEIGHTS_HOME, which only you can read. SUPABASE_URL,
    SUPABASE_ANON_KEY and OPENWEIGHTS_API_KEY of the environment win over it; with SUPABASE_URL set
    to nothing, commands use the store on this machine.
    """
    from openweights.backends import open_project

    home = home_folder()
    url = _asked(url, "URL of the project", "--url")
    anon_key = _asked(anon_key, "Public (anon) key of the project", "--anon-key")
    key = ask_secret("Your key, ow_…").strip()
    if not key:
        raise InvalidInputError("no key was given: it begins with ow_")
    settings = Settings(home, api_key=key, supabase_url=url, supabase_anon_key=anon_key)
    with closing(open_project(settings)) as project:
        identity = project.identity
    path = write_credentials(home, Credentials(url, anon_key, key))
    click.echo(f"logged in to {identity['organization']} as {identity['email']}")
    note(f"the {identity['role']}'s key is in {path}")
    if url.startswith("http://") and not _ON_THIS_MACHINE.match(url):
        note("but the address is not https: whoever is between can read the key and all else")
    _warn_of_environment(url, key)


def _asked(value: str | None, prompt: str, option: str) -> str:
    if value and value.strip():
        return value.strip()
    # Where the key comes from a pipe, nothing else can be asked for.
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"give {option}: standard input is no terminal to ask at")
    return click.prompt(prompt, err=True).strip()


def _warn_of_environment(url: str, key: str) -> None:
    found = Settings.from_env()
    if (found.supabase_url, found.api_key) != (url, key):
        note("but SUPABASE_URL or OPENWEIGHTS_API_KEY is set here and wins: unset them")


@click.command()
def logout() -> None:
    """Remove what `ow login` has stored.

    The key stays good: `ow token revoke` ends it.
    """
    home = home_folder()
    if delete_credentials(home):
        click.echo(f"removed {credentials_path(home)}; the key itself stays good")
    else:
        click.echo("you were not logged in")


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Show whose key is in use, and what it may do."""
    with open_team() as project:
        identity = {"url": project.url, **{name: project.identity[name] for name in _IDENTITY}}
    if as_json:
        print_json(identity)
    else:
        print_fields(identity)
