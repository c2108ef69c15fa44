"""`ow token`: the keys of an organization."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from openweights.cli.output import (
    age,
    json_option,
    local_time,
    note,
    one_line,
    print_json,
    print_table,
)
from openweights.cli.project.org import find_member
from openweights.cli.project.team import open_team
from openweights.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from openweights.types import KeyRecord

_LEAST_PREFIX = 4


def _finite(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    # A range of click's lets nan through: it is neither below nor above.
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a number")
    return value


@click.group()
def token() -> None:
    """Make, list and revoke keys of the organization."""


@token.command()
@click.option("--name", required=True, metavar="NAME", help="What the key is for.")
@click.option(
    "--role",
    type=click.Choice(["admin", "member", "worker"]),
    required=True,
    help="A worker's key runs jobs and nothing else.",
)
@click.option(
    "--expires-in-days",
    type=click.FloatRange(min=0, min_open=True, max=36_500),
    callback=_finite,
    metavar="N",
    help="Without it, the key is good until it is revoked.",
)
@click.option(
    "--budget-usd",
    type=click.FloatRange(min=0),
    callback=_finite,
    metavar="X",
    help="What its jobs may cost in all, on pods.",
)
@click.option("--member", metavar="EMAIL", help="Whose key it is.  [default: yours]")
@json_option
def create(
    name: str,
    role: str,
    expires_in_days: float | None,
    budget_usd: float | None,
    member: str | None,
    as_json: bool,
) -> None:
    """Make a key, and print it: once, for it is stored nowhere."""
    if not name.strip():
        raise InvalidInputError("--name: say what the key is for")
    expires_at = None
    if expires_in_days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=expires_in_days)
    with open_team() as project:
        owner = None if member is None else find_member(project.list_members(), member).id
        made = project.create_key(
            name.strip(), role, expires_at=expires_at, budget_usd=budget_usd, member_id=owner
        )
    if as_json:
        print_json(made)
        return
    click.echo(made.key)
    until = "until it is revoked" if expires_at is None else f"until {local_time(expires_at)}"
    note(f"{role}'s key {made.id}, good {until}; keep it, it is shown only now")


@token.command("ls")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys, with the beginning of each."""
    with open_team() as project:
        keys = project.list_keys()
    if as_json:
        print_json(keys)
        return
    now = datetime.now(UTC)
    columns = ["id", "key", "name", "role", "member", "state", "used", "usd", "budget"]
    print_table(columns, [_row(key, now) for key in keys])


def _row(key: KeyRecord, now: datetime) -> list[str]:
    return [
        key.id,
        f"{key.prefix}…",
        one_line(key.name),
        key.role,
        key.email,
        _state(key, now),
        "never" if key.last_used_at is None else f"{age(key.last_used_at, now)} ago",
        f"{key.spent_usd:.2f}",
        "none" if key.budget_usd is None else f"{key.budget_usd:.2f}",
    ]


def _state(key: KeyRecord, now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "good"
    when = local_time(key.expires_at)
    return f"expired {when}" if key.expires_at <= now else f"good until {when}"


@token.command()
@click.argument("keys", nargs=-1, metavar="ID...")
@click.option("--token-id", metavar="ID", hidden=True)  # as the older runner has it
def revoke(keys: tuple[str, ...], token_id: str | None) -> None:
    """Revoke keys: from their next request on they are refused.

    An ID is as `ow token ls` prints it, or its beginning, or the beginning of the key.
    """
    keys = (*keys, *((token_id,) if token_id else ()))
    if not keys:
        raise click.UsageError("name at least one key; `ow token ls` lists them")
    with open_team() as project:
        known = project.list_keys()
        # All are looked up before one is revoked.
        for key in [_find(known, text) for text in keys]:
            project.revoke_key(key.id)
            click.echo(f"revoked {key.id} ({one_line(key.name)})")


@token.command()
@click.argument("key", metavar="ID")
@click.argument("usd", metavar="USD")
def budget(key: str, usd: str) -> None:
    """Change what the jobs of a key may cost in all, on pods; USD may be `none`.

    An ID is as `ow token ls` prints it, or its beginning, or the beginning of the key.
    """
    limit = None if usd.lower() == "none" else _amount(usd)
    with open_team() as project:
        found = _find(project.list_keys(), key)
        project.set_budget(found.id, limit)
    click.echo(f"{found.id} ({one_line(found.name)}): {usd if limit is None else f'{limit:.2f}'}")


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidInputError(f"{one_line(text, 20)!r} is no amount in USD; give one, or `none`")
    return value


def _find(keys: list[KeyRecord], text: str) -> KeyRecord:
    # Not shown as it is: somebody may have pasted the whole key.
    shown = one_line(text, 11) or "''"
    if len(text) < _LEAST_PREFIX:
        raise InvalidInputError(f"{shown}: type at least {_LEAST_PREFIX} characters of an id")
    found = [key for key in keys if key.id.startswith(text.lower()) or _is_of(key, text)]
    if not found:
        raise NotFoundError(f"no key {shown}; `ow token ls` lists them")
    if len(found) > 1:
        raise InvalidInputError(f"{shown} begins {len(found)} keys: type more of the id")
    return found[0]


def _is_of(key: KeyRecord, text: str) -> bool:
    return text.startswith("ow_") and len(text) >= len(key.prefix) and text.startswith(key.prefix)
