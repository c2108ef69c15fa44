"""Brings the schema into a Supabase project over a direct connection, and says what differs there.

This is for whoever operates the project: users and workers never connect to the database. All of
`init` is one transaction, so a project is never half set up, and two at once take turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigurationError, InvalidInputError, StoreUnavailableError

if TYPE_CHECKING:
    from psycopg import Connection

_OLDEST_VERSION = 15
_LOCK = 0x6F77  # of two `init` at once, the second waits
_CONNECT_TIMEOUT_S = 20
_REMEDY = "run `ow db init`"
_FOLDER = files("openweights.backends.supabase.sql")

# (kind, name) -> definition
Catalog = dict[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `init` did.

    Attributes:
        steps: Steps of the schema that were applied.
        repaired: What had differed and is now as it should be.
        differences: What still differs: it was changed by hand, and is not ours to undo.
    """

    steps: list[str]
    repaired: list[str]
    differences: list[str]


@dataclass(frozen=True, slots=True)
class NewOrganization:
    """An organization and the key of its first admin, which is shown once."""

    organization_id: str
    key: str


def init(url: str) -> Outcome:
    """Set the project up, or bring it up to date. Doing it again changes nothing.

    Args:
        url: Of the database, as libpq takes it; with the rights of the role `postgres`.

    Raises:
        ConfigurationError: This is no Supabase project, or a newer version has set it up.
        StoreUnavailableError: The database cannot be reached.
    """
    with _connect(url) as db:
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        _check_project(db)
        expected, found = _installed(db), {} if _is_new(db) else _catalog(db)
        steps = _apply(db)
        now = _catalog(db)
        kept = _expected_from_now_on(expected, found, now)
        _remember(db, kept)
    before = _differences(expected, found)
    after = _differences(kept, now)
    return Outcome(steps, [line for line in before if line not in after], after)


def check(url: str) -> list[str]:
    """What differs from what this version of the package would set up; empty when nothing does.

    Raises:
        StoreUnavailableError: The database cannot be reached.
    """
    with _connect(url) as db:
        if _is_new(db):
            return [f"the database is not set up: {_REMEDY}"]
        known = dict(db.execute("SELECT name, sha256 FROM openweights.sources").fetchall())
        sources = _sources()
        stale = [name for name in sorted({*known, *sources}) if known.get(name) != _digest(name)]
        lines = [f"{name} is not that of this version of openweights: {_REMEDY}" for name in stale]
        return lines + _differences(_installed(db), _catalog(db))


def create_organization(url: str, name: str, email: str) -> NewOrganization:
    """A new organization with one member, an admin, and a first key.

    Raises:
        InvalidInputError: `name` or `email` is empty.
        ConfigurationError: The database is not set up.
        StoreUnavailableError: The database cannot be reached.
    """
    if not name.strip():
        raise InvalidInputError("organization: the name is empty; give one with --organization")
    if "@" not in email:
        raise InvalidInputError(f"email: {email!r} is no e-mail address; give the first admin's")
    with _connect(url) as db:
        if _is_new(db):
            raise ConfigurationError(f"the database is not set up: {_REMEDY} first")
        query = "SELECT openweights.create_organization(%s, %s)"
        answer = _one(db, query, (name.strip(), email.strip()))
    return NewOrganization(answer["organization_id"], answer["key"])


def source_digest() -> str:
    """Of the SQL of this version, as `whoami` tells it of what is installed."""
    lines = [f"{name} {_digest(name)}" for name in sorted(_sources())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- the database --------------------------------------------------------------------------------


@contextmanager
def _connect(url: str) -> Generator[Connection[tuple[Any, ...]]]:
    """One transaction. What libpq says names host and role, never the password."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError:
        raise ConfigurationError(
            "psycopg is not installed: pip install 'openweights[supabase]'"
        ) from None
    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        # What libpq says of it repeats it, with the password.
        raise ConfigurationError(
            "this is no connection string: write it like postgresql://postgres@host:5432/postgres"
        ) from None
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_TIMEOUT_S) as db:
            # What definitions look like depends on it.
            db.execute("SET LOCAL search_path = ''")
            yield db
    except psycopg.OperationalError as error:
        raise StoreUnavailableError(f"the database does not answer: {error}") from None
    except psycopg.errors.InsufficientPrivilege as error:
        raise ConfigurationError(
            f"{error.diag.message_primary}: connect as the role that owns the project's schemas, "
            "postgres"
        ) from None
    except psycopg.ProgrammingError as error:
        # PostgreSQL's hint says what to do, such as which function to drop first.
        hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
        reason = error.diag.message_primary or error
        raise ConfigurationError(f"the database refuses: {reason}{hint}") from error


def _one(db: Connection[tuple[Any, ...]], query: str, values: tuple[object, ...] = ()) -> Any:
    row = db.execute(query.encode(), values).fetchone()
    return None if row is None else row[0]


def _is_new(db: Connection[tuple[Any, ...]]) -> bool:
    return _one(db, "SELECT to_regclass('openweights.installed') IS NULL")


def _check_project(db: Connection[tuple[Any, ...]]) -> None:
    version = db.info.server_version // 10_000
    if version < _OLDEST_VERSION:
        raise ConfigurationError(
            f"the database is PostgreSQL {version}: upgrade it to {_OLDEST_VERSION} or newer"
        )
    if _one(db, "SELECT to_regclass('storage.objects') IS NULL OR to_regrole('anon') IS NULL"):
        raise ConfigurationError(
            "the database has no storage service or no role anon, so it is no Supabase project: "
            "take the connection string from the project's page"
        )


def _apply(db: Connection[tuple[Any, ...]]) -> list[str]:
    """Apply the steps that are missing, and all of the code; returns the steps."""
    query = "SELECT name FROM openweights.steps"
    applied = set[str]() if _is_new(db) else {name for (name,) in db.execute(query)}
    sources = _sources()
    known = {name for name in sources if name.startswith("schema/")}
    if applied - known:
        raise ConfigurationError(
            f"a newer openweights has set the database up ({', '.join(sorted(applied - known))}): "
            "upgrade openweights"
        )
    missing = sorted(known - applied)
    for name in [*missing, *sorted(set(sources) - known)]:
        db.execute(sources[name].encode())
    for name in missing:
        db.execute("INSERT INTO openweights.steps (name) VALUES (%s)", (name,))
    return missing


def _catalog(db: Connection[tuple[Any, ...]]) -> Catalog:
    query = (_FOLDER / "catalog.sql").read_bytes()
    return {(kind, name): text for kind, name, text in db.execute(query)}


def _installed(db: Connection[tuple[Any, ...]]) -> Catalog:
    if _is_new(db):
        return {}
    rows = db.execute("SELECT kind, name, definition FROM openweights.installed")
    return {(kind, name): text for kind, name, text in rows}


def _remember(db: Connection[tuple[Any, ...]], expected: Catalog) -> None:
    """Write down what `check` compares with; writes nothing when nothing has changed."""
    if expected != _installed(db):
        db.execute("DELETE FROM openweights.installed")
        rows = [(*item, text) for item, text in expected.items()]
        db.cursor().executemany("INSERT INTO openweights.installed VALUES (%s, %s, %s)", rows)
    digests = {name: _digest(name) for name in _sources()}
    if digests != dict(db.execute("SELECT name, sha256 FROM openweights.sources").fetchall()):
        db.execute("DELETE FROM openweights.sources")
        db.cursor().executemany(
            "INSERT INTO openweights.sources VALUES (%s, %s)", list(digests.items())
        )


# ---- comparing -----------------------------------------------------------------------------------


def _sources() -> dict[str, str]:
    """`schema/<step>` and `code/<file>` -> its text."""
    return {
        f"{folder}/{file.name}": file.read_text(encoding="utf-8")
        for folder in ("schema", "code")
        for file in (_FOLDER / folder).iterdir()
        if file.name.endswith(".sql")
    }


def _digest(name: str) -> str | None:
    text = _sources().get(name)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _expected_from_now_on(
    expected: Mapping[tuple[str, str], str],
    found: Mapping[tuple[str, str], str],
    now: Mapping[tuple[str, str], str],
) -> Catalog:
    """What is there now, except for what was changed by hand and `init` has not touched: that
    differs until somebody puts it right.
    """
    kept: Catalog = {}
    for item in {*expected, *now}:
        is_changed_by_hand = expected.get(item) != found.get(item)
        is_untouched = found.get(item) == now.get(item)
        text = expected.get(item) if is_changed_by_hand and is_untouched else now.get(item)
        if text is not None:
            kept[item] = text
    return kept


def _differences(
    expected: Mapping[tuple[str, str], str], found: Mapping[tuple[str, str], str]
) -> list[str]:
    lines: list[str] = []
    for item in sorted({*expected, *found}):
        if item not in found:
            lines.append(f"{' '.join(item)} is missing")
        elif item not in expected:
            lines.append(f"{' '.join(item)} is not ours: {found[item].splitlines()[0]}")
        elif expected[item] != found[item]:
            lines.append(f"{' '.join(item)} was changed")
    return lines
