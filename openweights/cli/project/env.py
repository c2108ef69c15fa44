"""`ow env`: the organization's secrets, which jobs get as variables."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from openweights.cli.output import json_option, local_time, note, print_json, print_table
from openweights.cli.project.team import ask_secret
from openweights.errors import InvalidInputError, InvalidStateError

if TYPE_CHECKING:
    from openweights.client.secrets import SecretCollection

_SECRETS_KEY = "OPENWEIGHTS_SECRETS_KEY"


@click.group()
def env() -> None:
    """Keep secrets that jobs get as variables.

    A value is sealed on this machine and shown to nobody afterwards. A job gets those that it
    names: `ow exec --secret NAME`, or `create(secrets=["NAME"])`.
    """


@env.command()
@click.option("--replace", is_flag=True, help="Make another pair; needs an organization without "
              "secrets.")  # fmt: skip
def init(replace: bool) -> None:
    """Make the pair of keys that seals and opens secrets; for an admin.

    The public key is stored in the project. The private one is printed, once: it belongs into the
    environment of workers. A cluster manager that has it gives it to its pods.
    """
    with _secrets() as secrets:
        if not replace and secrets.has_key():
            raise InvalidStateError(
                "the organization has its pair of keys already; `ow env init --replace` makes "
                "another one, once all secrets are removed"
            )
        private_key = secrets.create_key()
    click.echo(f"{_SECRETS_KEY}={private_key}")
    note(
        "keep this line, it is shown only now: put it into the environment of `ow cluster` and "
        "`ow worker`"
    )


@env.command("set")
@click.argument("text", metavar="NAME[=VALUE]")
def set_secret(text: str) -> None:
    """Add or replace a secret.

    Without =VALUE, the value is asked for, or read from standard input: then it is in no shell's
    history.
    """
    from openweights.client.secrets import check_secret_name

    name, is_pair, value = text.partition("=")
    check_secret_name(name)
    with _secrets() as secrets:
        _set(secrets, {name: value if is_pair else ask_secret(f"Value of {name}")})


@env.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_file(file: Path) -> None:
    """Add all secrets of a file with NAME=VALUE on each line, such as .env."""
    from openweights.cluster.supervisor import parse_env

    try:
        values = parse_env(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InvalidInputError(f"{file} is not UTF-8") from None
    except InvalidInputError as error:
        raise InvalidInputError(f"{file}: {error}") from None
    if not values:
        raise InvalidInputError(f"{file} has no line NAME=VALUE")
    with _secrets() as secrets:
        _set(secrets, values)


@env.command("ls")
@json_option
def list_secrets(as_json: bool) -> None:
    """List the names of the secrets."""
    with _secrets() as secrets:
        found = secrets.list()
    if as_json:
        print_json(found)
    else:
        print_table(["name", "set"], [[s.name, local_time(s.updated_at)] for s in found])


# The older runner's name for it; it printed the values, too.
env.add_command(list_secrets, "show")


@env.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove secrets."""
    with _secrets() as secrets:
        for name in names:
            secrets.delete(name)
            click.echo(f"removed {name}")


def _set(secrets: SecretCollection, values: dict[str, str]) -> None:
    from openweights.worker.redaction import MIN_LENGTH

    secrets.set(values)
    for name, value in values.items():
        click.echo(f"set {name}")
        if len(value) < MIN_LENGTH:
            note(f"{name} is shorter than {MIN_LENGTH} characters: logs will show it")


@contextmanager
def _secrets() -> Generator[SecretCollection]:
    from openweights.client import OpenWeights

    ow = OpenWeights()
    try:
        yield ow.secrets
    finally:
        ow.close()
