"""`ow whoami`."""

from __future__ import annotations

import click

from openweights.cli.output import json_option, print_fields, print_json
from openweights.cli.team import open_team

_SHOWN = (
    *("organization", "organization_id", "email", "role", "key_name", "key_id", "worker_id"),
    "expires_at",
)


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Show whose key is in use, and what it may do."""
    with open_team() as project:
        identity = {"url": project.url, **{name: project.identity[name] for name in _SHOWN}}
    if as_json:
        print_json(identity)
    else:
        print_fields(identity)
