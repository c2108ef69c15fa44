"""`ow version`."""

from __future__ import annotations

import platform

import click

from openweights import __version__
from openweights.cli.output import json_option, print_json


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": __version__, "python": platform.python_version()})
    else:
        click.echo(f"openweights {__version__}")
