"""`ow org`: the organization and its members."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from openweights.cli.output import (
    json_option,
    local_time,
    one_line,
    print_fields,
    print_json,
    print_table,
)
from openweights.cli.project.team import open_team
from openweights.errors import NotFoundError

if TYPE_CHECKING:
    from openweights.types import MemberRecord


@click.group()
def org() -> None:
    """Show or rename the organization, and its members."""


@org.command()
@json_option
def show(as_json: bool) -> None:
    """Show the organization."""
    with open_team() as project:
        identity = project.identity
        values = {
            "organization": identity["organization"],
            "organization_id": identity["organization_id"],
            "url": project.url,
            "members": len(project.list_members()),
            "secrets": len(project.list_secrets()),
        }
    if as_json:
        print_json(values)
    else:
        print_fields(values)


@org.command()
@click.argument("name")
def rename(name: str) -> None:
    """Give the organization another name."""
    with open_team() as project:
        project.rename_organization(name)
    click.echo(f"the organization is now called {one_line(name)}")


@org.command("max-duration")
@click.argument("hours", type=click.FloatRange(min=0.001))
@click.option("--none", "is_unlimited", is_flag=True, help="No limit any more; HOURS is ignored.")
def max_duration(hours: float, is_unlimited: bool) -> None:
    """Stop runs after HOURS whose job does not say how long they may take."""
    with open_team() as project:
        state = project.set_max_duration(None if is_unlimited else hours * 3600)
    limit = state.max_duration_s
    click.echo("runs have no limit" if limit is None else f"runs may take {limit / 3600:g} hours")


@org.command()
@click.option("--log-mb", type=click.IntRange(1, 1024), help="Of a run's log, at most.")
@click.option("--days", type=click.FloatRange(min=1), help="What nobody needs goes after as many.")
@click.option("--for-ever", is_flag=True, help="Nothing goes by itself, only with `ow gc`.")
def keep(log_mb: int | None, days: float | None, for_ever: bool) -> None:
    """Show or set how much of logs is kept, and for how long what nobody needs.

    The manager does once a day what `ow gc` does; see there what that is.
    """
    if for_ever and days is not None:
        raise click.UsageError("--days and --for-ever: use one of them")
    with open_team() as project:
        most, kept = project.retention()
        if log_mb is not None or days is not None or for_ever:
            most, kept = log_mb or most, None if for_ever else days or kept
            project.set_retention(most, kept)
    how_long = "until `ow gc` removes it" if kept is None else f"{kept:g} days"
    print_fields({"of a run's log": f"{most} MB", "what nobody needs": how_long})


@org.group()
def members() -> None:
    """List, add and remove members."""


@members.command("ls")
@json_option
def list_members(as_json: bool) -> None:
    """List the members."""
    with open_team() as project:
        found = project.list_members()
    if as_json:
        print_json(found)
        return
    rows = [[m.email, m.role, local_time(m.created_at), m.id] for m in found]
    print_table(["member", "role", "since", "id"], rows)


@members.command()
@click.argument("email")
@click.option("--role", type=click.Choice(["admin", "member"]), default="member", show_default=True)
def add(email: str, role: str) -> None:
    """Add a member, or change a member's role.

    `ow token create --member EMAIL` makes the key with which they log in.
    """
    with open_team() as project:
        found = project.add_member(email, role)
    click.echo(f"{found.email} is {'an' if role == 'admin' else 'a'} {role}")


@members.command()
@click.argument("email")
def rm(email: str) -> None:
    """Remove a member, whose keys are dead from then on."""
    with open_team() as project:
        found = find_member(project.list_members(), email)
        project.remove_member(found.id)
    click.echo(f"removed {found.email} and their keys")


def find_member(found: list[MemberRecord], text: str) -> MemberRecord:
    """The member of that e-mail address or id; raises NotFoundError."""
    for member in found:
        if text.lower() in (member.email.lower(), member.id):
            return member
    raise NotFoundError(f"no member {one_line(text, 80)}; `ow org members ls` lists them")
