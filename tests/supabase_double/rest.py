"""The part of PostgREST that this package uses, over a real PostgreSQL.

Each request is one transaction in which role and `request.headers` are set as PostgREST sets them,
so what a key may see is decided by the very policies of the project. What is left out is answered
with an error that says so: writing to tables, embedding, ranges by header, sets from functions,
other schemas.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString, cast

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

MAX_ROWS = 1000
# What a hosted project gives the role anon.
STATEMENT_TIMEOUT_MS = 3000
_CONNECTIONS = 10
_OPERATORS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "cs": "@>"}
_NO_FILTERS = frozenset({"select", "order", "limit", "offset", "columns", "on_conflict"})
_STATUS_BY_CLASS = {"08": 503, "53": 503, "40": 500, "54": 500, "55": 500, "57": 500, "XX": 500}
_STATUS = {"23503": 409, "23505": 409, "25006": 405, "42883": 404, "42P01": 404, "P0001": 400}
_FUNCTIONS = """
    select proname, coalesce(proargnames[1:pronargs], '{}')::text[],
        array(select format_type(t, null) from unnest(proargtypes) with ordinality u(t, n)
              order by n)::text[],
        pronargdefaults, proretset, format_type(prorettype, null)
    from pg_proc where pronamespace = 'public'::regnamespace and prokind = 'f'
"""


class HttpError(Exception):
    """An answer that is an error, with a body like PostgREST's."""

    def __init__(self, status: int, code: str, message: str, details: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, "details": details, "hint": None}


@dataclass
class Answer:
    """What goes back; `content` is JSON text."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Function:
    types: Mapping[str, str]
    required: frozenset[str]
    returns_set: bool
    result: str


class Database:
    """A project's database: connections for many threads, and the transaction of a request."""

    def __init__(self, dsn: str, name: str) -> None:
        self._dsn = make_conninfo(dsn, dbname=name, user="authenticator")
        self._idle: queue.LifoQueue[psycopg.Connection[Any]] = queue.LifoQueue()
        self._free = threading.Semaphore(_CONNECTIONS)
        self._functions: dict[str, Function] = {}

    @contextmanager
    def transaction(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        *,
        role: str = "anon",
        read_only: bool = False,
    ) -> Iterator[psycopg.Cursor[Any]]:
        """A transaction of one request; errors of PostgreSQL become those of PostgREST."""
        with self._free:
            db = self._connection()
            cursor = psycopg.ClientCursor(db)
            try:
                cursor.execute(
                    f"begin {'read only' if read_only else ''}; select "
                    "set_config('role', %s, true), set_config('request.headers', %s, true), "
                    "set_config('request.method', %s, true), set_config('request.path', %s, true), "
                    "set_config('request.jwt.claims', %s, true), "
                    "set_config('search_path', 'public', true), "
                    "set_config('statement_timeout', %s, true)",
                    [
                        *(role, json.dumps(dict(headers)), method, path),
                        *(json.dumps({"role": role}), str(STATEMENT_TIMEOUT_MS)),
                    ],
                )
                yield cursor
                cursor.execute("commit")
            except BaseException as error:
                if not db.closed:
                    cursor.execute("rollback")
                if isinstance(error, psycopg.Error):
                    raise _from_postgres(error, role) from error
                raise
            finally:
                if not db.closed:
                    self._idle.put(db)

    def function(self, name: str, names: frozenset[str]) -> Function:
        """The function that takes these arguments; looked up once more if it is not known."""
        for is_fresh in (False, True):
            found = self._functions.get(name)
            if found and found.required <= names <= found.types.keys():
                return found
            if not is_fresh:
                self._functions = dict(self._read_functions())
        shown = ", ".join(sorted(names))
        raise HttpError(
            404,
            "PGRST202",
            f"Could not find the function public.{name}({shown}) in the schema cache",
        )

    def _read_functions(self) -> Iterator[tuple[str, Function]]:
        with self.transaction("GET", "/", {}, read_only=True) as cursor:
            for name, names, types, defaults, is_set, result in cursor.execute(_FUNCTIONS):
                required = names[: len(names) - defaults]
                types_by_name = dict(zip(names, types, strict=True))
                yield name, Function(types_by_name, frozenset(required), is_set, result)

    def _connection(self) -> psycopg.Connection[Any]:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return psycopg.connect(self._dsn, autocommit=True)


def _from_postgres(error: psycopg.Error, role: str) -> HttpError:
    # A NUL does not get past the driver here; PostgreSQL itself calls it a bad sequence of bytes.
    unsent = "22021" if isinstance(error, psycopg.DataError) else "08006"
    code = error.sqlstate or unsent
    if code == "42501":
        status = 401 if role == "anon" else 403
    elif code.startswith("PT"):
        status = int(code[2:])
    else:
        status = _STATUS.get(code) or _STATUS_BY_CLASS.get(code[:2], 400)
    message = error.diag.message_primary or str(error)
    return HttpError(status, code, message, error.diag.message_detail)


Parameters = Sequence[tuple[str, str]]


def serve_rest(
    database: Database,
    method: str,
    path: str,
    parameters: Parameters,
    headers: Mapping[str, str],
    body: bytes,
    *,
    max_rows: int = MAX_ROWS,
) -> Answer:
    """Answer `/rest/v1/<path>`."""
    if headers.get("accept-profile", "public") != "public":
        raise HttpError(406, "PGRST106", "The schema must be one of the following: public")
    head, _, name = path.partition("/")
    if head == "rpc":
        with database.transaction(method, path, headers) as cursor:
            return _call(database, cursor, name, body)
    if method != "GET":
        raise HttpError(501, "DOUBLE", f"this double does not serve {method} of tables")
    try:
        with database.transaction(method, path, headers, read_only=True) as cursor:
            return _select(cursor, path, parameters, max_rows)
    except HttpError as error:
        if error.body["code"] == "42P01":
            message = f"Could not find the table 'public.{path}' in the schema cache"
            raise HttpError(404, "PGRST205", message) from error
        raise


def _call(database: Database, cursor: psycopg.Cursor[Any], name: str, body: bytes) -> Answer:
    arguments = json.loads(body or b"{}")
    function = database.function(name, frozenset(arguments))
    if function.returns_set:
        raise HttpError(501, "DOUBLE", f"{name} returns rows, which this double does not serve")
    given = sql.SQL(", ").join(
        sql.SQL("{} := _a.{}").format(sql.Identifier(key), sql.Identifier(key)) for key in arguments
    )
    call = sql.SQL("select to_json(public.{}({}))::text").format(sql.Identifier(name), given)
    if arguments:
        typed = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(key), _text(function.types[key]))
            for key in arguments
        )
        call += sql.SQL(" from json_to_record({}) as _a({})").format(
            sql.Literal(body.decode()), typed
        )
    row = cursor.execute(call).fetchone()
    if function.result == "void":
        return Answer(204)
    return Answer(200, ((row and row[0]) or "null").encode())


def _select(
    cursor: psycopg.Cursor[Any], table: str, parameters: Parameters, max_rows: int
) -> Answer:
    given = dict(parameters)
    names = given.get("select", "*")
    if not re.fullmatch(r"\*|\w+(,\w+)*", names):
        raise HttpError(501, "DOUBLE", f"this double selects plain columns, not {names!r}")
    chosen = sql.SQL("*") if names == "*" else sql.SQL(", ").join(map(_column, names.split(",")))
    query = sql.SQL("select {} from {}").format(chosen, _table(table))
    query += _where(parameters) + _order(given.get("order"))
    limit = min(int(given.get("limit", max_rows)), max_rows)
    query += _text(f" limit {limit} offset {int(given.get('offset', 0))}")
    counted = sql.SQL("select coalesce(json_agg(s), '[]')::text, count(*) from ({}) s").format(
        query
    )
    row = cursor.execute(counted).fetchone()
    assert row is not None
    text, count = row
    span = f"0-{count - 1}/*" if count else "*/*"
    return Answer(200, text.encode(), {"content-range": span})


def _text(text: str) -> sql.SQL:
    """SQL that this file, or the catalogue, wrote; never a client's."""
    return sql.SQL(cast(LiteralString, text))


def _table(name: str) -> sql.Composable:
    return sql.Identifier("public", name)


def _column(name: str) -> sql.Composable:
    return sql.Identifier(name)


def _where(parameters: Parameters) -> sql.Composable:
    found = [_condition(key, value) for key, value in parameters if key not in _NO_FILTERS]
    return sql.SQL(" where ") + sql.SQL(" and ").join(found) if found else sql.SQL("")


def _condition(column: str, value: str) -> sql.Composable:
    if column in ("or", "and"):
        terms = [_term(term) for term in _split(value[1:-1])]
        return sql.SQL("({})").format(sql.SQL(f" {column} ").join(terms))
    operator, _, operand = value.partition(".")
    if operator == "not":
        return sql.SQL("not ({})").format(_condition(column, operand))
    if operator == "is" and operand == "null":
        return _column(column) + sql.SQL(" is null")
    if operator == "in":
        items = sql.SQL(", ").join(map(sql.Literal, _items(operand)))
        return sql.SQL("{} in ({})").format(_column(column), items)
    if not re.fullmatch(r"\w+(->>\w+)?", column) or operator not in _OPERATORS:
        raise HttpError(501, "DOUBLE", f"this double does not know the filter {column}={value}")
    name, _, key = column.partition("->>")
    left = _column(name) + (sql.SQL(" ->> ") + sql.Literal(key) if key else sql.SQL(""))
    return sql.SQL("{} {} {}").format(left, _text(_OPERATORS[operator]), sql.Literal(operand))


def _term(text: str) -> sql.Composable:
    """A member of `or=(…)`: a condition, or another list."""
    nested = re.fullmatch(r"(or|and)(\(.*\))", text)
    column, _, value = text.partition(".")
    return _condition(nested[1], nested[2]) if nested else _condition(column, value)


def _split(text: str) -> list[str]:
    """What stands between the commas outside parentheses."""
    found, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def _items(operand: str) -> list[str]:
    """`(a,"b,c")` -> a and b,c."""
    quoted = r'"((?:[^"\\]|\\.)*)"|([^,()"]+)'
    found = re.findall(quoted, operand[1:-1])
    return [re.sub(r"\\(.)", r"\1", one) or two for one, two in found]


def _order(text: str | None) -> sql.Composable:
    if not text:
        return sql.SQL("")
    keys: list[sql.Composable] = []
    for key in text.split(","):
        column, _, direction = key.partition(".")
        if direction not in ("", "asc", "desc"):
            raise HttpError(501, "DOUBLE", f"this double does not know the order {key!r}")
        keys.append(_column(column) + _text(" " + direction))
    return sql.SQL(" order by ") + sql.SQL(", ").join(keys)
