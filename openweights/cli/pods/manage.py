"""`ow manage`."""

from __future__ import annotations

from pathlib import Path

import click

from openweights.cli.output import read_text
from openweights.settings import Settings


@click.group()
def manage() -> None:
    """Name the organizations that are managed here.

    `ow cluster --all` runs a manager for each of them.
    """


@manage.command()
@click.argument("name")
@click.option(
    "--env-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="The manager's variables, a NAME=value on each line.",
)
def start(name: str, env_file: Path) -> None:
    """Manage an organization, or change its variables.

    FILE must set SUPABASE_URL, SUPABASE_ANON_KEY, OPENWEIGHTS_API_KEY (an admin's key) and
    RUNPOD_API_KEY, and may set MAX_WORKERS, OPENWEIGHTS_SECRETS_KEY for jobs with secrets, and
    OPENWEIGHTS_POD_ENV with what it names. It is copied to where only you can read it.
    """
    from openweights.cluster.supervisor import manage as put

    put(_folder(), name, read_text(env_file))
    click.echo(f"{name} is managed while `ow cluster --all` runs here")


@manage.command()
@click.argument("name")
def stop(name: str) -> None:
    """Manage an organization no longer.

    Its pods go on until their jobs are done, but nobody ends them then: end its jobs first, or wait
    until `ow cluster --dry-run` has nothing to do.
    """
    from openweights.cluster.supervisor import unmanage

    unmanage(_folder(), name)
    click.echo(f"{name} is not managed here any more; look after its pods")


@manage.command("ls")
def list_names() -> None:
    """Print the names of the managed organizations."""
    for path in sorted(_folder().glob("*.env")):
        click.echo(path.stem)


def _folder() -> Path:
    return Settings.from_env().home / "managed"
