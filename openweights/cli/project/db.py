"""`ow db` and `ow signup`: what the operator of a Supabase project does, over its database."""

from __future__ import annotations

import sys

import click

from openweights.cli.output import json_option, note, print_json, printable

_url_option = click.option(
    "--url",
    required=True,
    metavar="URL",
    help="Connection string of the database, role postgres; a password that it lacks is taken "
    "from PGPASSWORD or ~/.pgpass.",
)


@click.group()
def db() -> None:
    """Set up the database of a Supabase project, and check it."""


@db.command()
@_url_option
def init(url: str) -> None:
    """Create or update tables, functions, policies and grants.

    Doing it again changes nothing. What was altered by hand in functions, policies and grants is
    put right; tables are left as they are, and what differs in them is printed.
    """
    from openweights.backends.supabase.sql import apply

    outcome = apply.init(url)
    for step in outcome.steps:
        click.echo(f"applied {printable(step)}")
    for line in outcome.repaired:
        click.echo(f"repaired: {printable(line)}")
    _end(outcome.differences, "the database is set up")


@db.command()
@_url_option
@json_option
def check(url: str, as_json: bool) -> None:
    """Print what differs from what this version sets up.

    The exit code is 1 if anything does.
    """
    from openweights.backends.supabase.sql import apply

    differences = apply.check(url)
    if as_json:
        print_json({"ok": not differences, "differences": differences})
        sys.exit(1 if differences else 0)
    _end(differences, "the database is as this version sets it up")


def _end(differences: list[str], all_is_well: str) -> None:
    for line in differences:
        click.echo(f"differs: {printable(line)}")
    if differences:
        sys.exit(1)
    click.echo(all_is_well)


@click.command()
@click.argument("email")
@_url_option
@click.option("--organization", metavar="NAME", help="Its name.  [default: EMAIL]")
@click.option("--org-env", metavar="FILE", hidden=True)  # as the older runner has it
@json_option
def signup(
    email: str, url: str, organization: str | None, org_env: str | None, as_json: bool
) -> None:
    """Create an organization and its first key.

    EMAIL is its first admin's. The key is printed once, and stored nowhere.
    """
    from openweights.backends.supabase.sql import apply

    created = apply.create_organization(url, organization or email, email)
    if as_json:
        print_json(created)
        return
    click.echo(f"organization  {created.organization_id}")
    click.echo(f"admin key     {created.key}")
    click.echo("Keep the key: it is shown only now. `ow login` stores it here.", err=True)
    if org_env:
        note(f"secrets are sealed: `ow login`, `ow env init`, then `ow env import {org_env}`")
