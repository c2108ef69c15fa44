"""Calls to the functions of a project's database, made as PostgREST makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from openweights.backends.supabase.sql import apply


class Caller:
    """A connection that speaks for one key.

    Args:
        url: Of the database.
        key: Sent as the header `x-ow-key`; None for nobody.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._db = psycopg.connect(url, autocommit=True)
        self.url = url
        self.key = key

    def close(self) -> None:
        self._db.close()

    def query(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """Rows of a statement in a transaction with the role and the headers of a request."""
        with self._db.transaction():
            become(self._db, self.key)
            cursor = self._db.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def rpc(self, name: str, /, **parameters: Any) -> Any:
        """What the function answers; dicts and lists of dicts are passed as JSON."""
        return self.query(*statement(name, parameters))[0][0]


def statement(name: str, parameters: Mapping[str, Any]) -> tuple[str, tuple[object, ...]]:
    """What calls a function, and its values."""
    given = ", ".join(f"p_{parameter} => %s" for parameter in parameters)
    return f"SELECT public.{name}({given})", tuple(map(_adapted, parameters.values()))


def become(db: psycopg.Connection[Any], key: str | None) -> None:
    """Take on, until the transaction ends, the role and the headers that PostgREST sets."""
    headers = json.dumps({} if key is None else {"x-ow-key": key})
    db.execute("SELECT set_config('request.headers', %s, true)", (headers,))
    db.execute("SET LOCAL ROLE anon")


def _adapted(value: Any) -> Any:
    is_json = isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    )
    return Jsonb(value) if is_json else value


def sign_up(url: str) -> str:
    """A new organization; returns the key of its admin."""
    return apply.create_organization(url, "Lab", "admin@example.org").key


def job(job_id: str, **changes: Any) -> dict[str, Any]:
    """A job as `submit_job` takes it."""
    return {"id": job_id, "type": "custom", "script": "true", "params": {}} | changes
