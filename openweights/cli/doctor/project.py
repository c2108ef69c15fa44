"""The part of `ow doctor` about a Supabase project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from openweights.cli.output import local_time, one_line
from openweights.credentials import credentials_path
from openweights.errors import ConfigurationError, OpenWeightsError
from openweights.settings import Settings

if TYPE_CHECKING:
    from openweights.backends.supabase.backend import SupabaseBackend

_SOON = timedelta(days=7)
# Moments of this machine and of the project stand beside each other in listings.
_MOST_SKEW_S = 30.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        status: `broken` is needed and does not work; `missing` is optional; `warning` works, but
            perhaps not for long.
        remedy: What to do about it.
    """

    name: str
    status: Literal["ok", "missing", "warning", "broken"]
    detail: str
    remedy: str | None = None


def project_checks(settings: Settings) -> Iterator[Check]:
    """All about the project of `settings`. A check called "store" ends them: it is out of reach."""
    from openweights.backends import open_project

    try:
        project = open_project(settings)
        with closing(project):
            yield _key(project)
            yield from _credentials(settings)
            yield _schema(project)
            yield _storage(project)
            yield _clock(project)
            yield _secrets(project, settings)
    except OpenWeightsError as error:
        name = f"Supabase {settings.supabase_url}"
        yield Check("store", "broken", f"{name}: {one_line(error)}")


def _key(project: SupabaseBackend) -> Check:
    who = project.identity
    detail = f"{who['role']}'s of {who['organization']} ({who['email']}), {who['key_name']!r}"
    if who["expires_at"] is None:
        return Check("key", "ok", detail)
    expires_at = datetime.fromisoformat(who["expires_at"])
    detail += f", good until {local_time(expires_at)}"
    if expires_at - datetime.now(UTC) < _SOON:
        return Check("key", "warning", detail, "ask an admin for a new one: `ow token create`")
    return Check("key", "ok", detail)


def _credentials(settings: Settings) -> Iterator[Check]:
    """Whether others can read what `ow login` has stored."""
    path = credentials_path(settings.home)
    if not path.exists():
        return
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        yield Check("credentials", "warning", f"others can read {path}", f"chmod 600 {path}")
    else:
        yield Check("credentials", "ok", f"{path}, which only you can read")


def _schema(project: SupabaseBackend) -> Check:
    from openweights.backends.supabase.sql.apply import source_digest

    if project.identity.get("sources") == source_digest():
        return Check("schema", "ok", "tables and functions are those of this version")
    return Check(
        "schema",
        "warning",
        "tables and functions were set up by another version of openweights",
        "whoever operates the project runs `ow db init` with the newer version; upgrade the older",
    )


def _storage(project: SupabaseBackend) -> Check:
    problem = project.storage_problem()
    if problem is not None:
        return Check("storage", "broken", one_line(problem, 200), "run `ow db init`")
    return Check("storage", "ok", "files are kept, and those of others are out of reach")


def _clock(project: SupabaseBackend) -> Check:
    ahead_s = (datetime.now(UTC) - project.now()).total_seconds()
    if abs(ahead_s) <= _MOST_SKEW_S:
        return Check("clock", "ok", "agrees with the project's")
    detail = f"this machine's is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    return Check(
        "clock",
        "warning",
        detail,
        "set it by NTP; what counts is the project's, but moments in listings are wrong",
    )


def _secrets(project: SupabaseBackend, settings: Settings) -> Check:
    """Whether secrets can be sealed, by a person, or opened, by a worker."""
    from openweights.backends.supabase.sealing import public_key_of

    remedy = "take the one that `ow env init` has printed"
    try:
        own = public_key_of(settings.secrets_key) if settings.secrets_key else None
    except ConfigurationError as error:
        return Check("secrets", "broken", one_line(error), remedy)
    if project.identity["role"] == "worker":
        if own is not None:
            return Check("secrets", "ok", "this worker has a key to open them with")
        return Check("secrets", "missing", "without OPENWEIGHTS_SECRETS_KEY jobs get none here")
    public_key = project.secrets_key()
    if public_key is None:
        return Check("secrets", "missing", "none can be set yet", "an admin runs `ow env init`")
    if own not in (None, public_key):
        detail = "OPENWEIGHTS_SECRETS_KEY is not the organization's"
        return Check("secrets", "broken", detail, remedy)
    return Check("secrets", "ok", f"{len(project.list_secrets())} set")
