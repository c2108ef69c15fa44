"""What all verbs of a Supabase store stand on: its connections, calls, and rows in pages."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast

import httpx

from openweights.backends.supabase.calls import PATIENCE_S, check_response, patiently
from openweights.backends.supabase.records import Row, columns, from_rows, moment
from openweights.backends.supabase.storage import BUCKET
from openweights.errors import ConfigurationError, InvalidStateError
from openweights.types import FileRecord, JobRecord, WorkerRecord

T = TypeVar("T")
Listed = TypeVar("Listed", JobRecord, FileRecord, WorkerRecord)
# A query of the supabase client, and what adds conditions to it.
Query = Any
Narrow = Callable[[Query], Query]

PAGE_ROWS = 1000
# A job's next page may wait for a lock, a part of a file for the network.
_TIMEOUT = httpx.Timeout(30.0, connect=10.0, write=60.0)
_KEY = re.compile(r"ow_\w+", re.ASCII)
_PREFIX_LENGTH = 11


class Client(Protocol):
    """What is used of the supabase client."""

    @property
    def storage(self) -> Any: ...
    def table(self, table_name: str) -> Any: ...
    def rpc(self, fn: str, params: dict[Any, Any] | None = None) -> Any: ...


@dataclass(frozen=True, slots=True)
class Connection:
    """Open sockets belong to one process: a forked one must not write into its parent's."""

    pid: int
    http: httpx.Client
    client: Client


class Project(ABC):
    """An open project; see `SupabaseBackend` for the arguments."""

    def __init__(
        self,
        url: str,
        anon_key: str,
        api_key: str,
        *,
        heartbeat_s: float | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if not re.fullmatch(r"https?://[^\s/]+\S*", url):
            raise ConfigurationError(f"SUPABASE_URL={url!r} is no address such as https://….co")
        if not _KEY.fullmatch(api_key):
            raise ConfigurationError("the key (OPENWEIGHTS_API_KEY) is none: keys begin with ow_")
        self.url = url.rstrip("/")
        self._anon_key = anon_key
        self._api_key = api_key
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._connection: Connection | None = None
        self._identity: Mapping[str, Any] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r}, key {self._shown_key})"

    @property
    def _headers(self) -> dict[str, str]:
        return {
            "apikey": self._anon_key,
            "Authorization": f"Bearer {self._anon_key}",
            "x-ow-key": self._api_key,
        }

    @property
    def _shown_key(self) -> str:
        return f"{self._api_key[:_PREFIX_LENGTH]}…"

    def close(self) -> None:
        self._is_closed = True
        if self._connection is not None and self._connection.pid == os.getpid():
            self._connection.http.close()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the project says of the key: its organization, role and worker, and the timing."""
        if self._identity is None:
            self._identity = cast(Mapping[str, Any], self.rpc("whoami"))
        return self._identity

    @property
    def organization_id(self) -> str:
        return self.identity["organization_id"]

    @property
    def heartbeat_s(self) -> float:
        return self._heartbeat_s or float(self.identity["heartbeat_s"])

    @property
    def lease_s(self) -> float:
        return float(self.identity["lease_s"])

    def now(self) -> datetime:
        return moment(self.rpc("whoami")["now"])

    # ---- calls

    def rpc(self, function: str, /, **parameters: Any) -> Any:
        """The answer of a SQL function, whose parameters are given without their `p_`.

        It is called again when an answer is lost.

        Raises:
            StoreUnavailableError: The project cannot be reached.
            OpenWeightsError: What the function, or the project, has against it.
        """
        return self._patiently(self._call(function, parameters))

    def _rpc_once(
        self, function: str, parameters: Mapping[str, Any], look: Callable[[], T | None]
    ) -> Any | T:
        """As `rpc`, for what may not be done twice: after a lost answer `look` says what it did."""
        count = 0
        once = self._call(function, parameters)

        def call() -> Any:
            nonlocal count
            count += 1
            return once()

        try:
            return self._patiently(call)
        except InvalidStateError:
            found = look() if count > 1 else None
            if found is None:
                raise
            return found

    def _call(self, function: str, parameters: Mapping[str, Any]) -> Callable[[], Any]:
        arguments = {f"p_{key}": value for key, value in parameters.items()}
        return lambda: self._open().client.rpc(function, arguments).execute().data

    def _patiently(self, call: Callable[[], T]) -> T:
        try:
            return patiently(call, self._patience_s, self.url)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} (key {self._shown_key}, {self.url})") from error

    def _bucket(self) -> Any:
        """The storage that holds the content of files, as the supabase client gives it."""
        return self._open().client.storage.from_(BUCKET)

    # ---- rows

    def _rows(self, table: str, names: str, narrow: Narrow) -> list[Row]:
        def call() -> list[Row]:
            query = self._open().client.table(table).select(names)
            return cast(list[Row], narrow(query).execute().data)

        return self._patiently(call)

    def _pages(
        self, table: str, names: str, narrow: Narrow, *, after: object, descending: bool = False
    ) -> Iterator[list[Row]]:
        """All rows, by their ids, which never change: no row is left out while others come and go.

        Args:
            after: The id before the first one that is wanted; None for all.
        """
        while True:

            def page(query: Query, after: object = after) -> Query:
                query = narrow(query).order("id", desc=descending).limit(PAGE_ROWS)
                if after is None:
                    return query
                return query.lt("id", after) if descending else query.gt("id", after)

            rows = self._rows(table, names, page)
            # Only an empty page is surely the last one: a project gives no more rows at once than
            # it is set to, which may be any number.
            if not rows:
                return
            yield rows
            after = rows[-1]["id"]

    def _newest(
        self,
        table: str,
        record: type[Listed],
        moment_column: str,
        limit: int | None,
        narrow: Narrow,
        keep: Callable[[Listed], bool] | None = None,
    ) -> list[Listed]:
        """Records by falling `moment_column`; the first `limit` of those to `keep`."""
        names = columns(record)

        def newest(query: Query) -> Query:
            query = narrow(query).order(moment_column, desc=True).order("seq", desc=True)
            return query.limit(limit if keep is None else PAGE_ROWS)

        def kept(rows: list[Row]) -> list[Listed]:
            return [item for item in from_rows(record, rows) if keep is None or keep(item)]

        if limit is not None and limit <= PAGE_ROWS:
            rows = self._rows(table, names, newest)
            found = kept(rows)
            if len(found) >= limit or not rows:
                return found[:limit]
        pages = self._pages(table, names, narrow, after="")
        found = [item for page in pages for item in kept(page)]
        found.sort(key=lambda item: (getattr(item, moment_column), item.id), reverse=True)
        return found[:limit]

    def _open(self) -> Connection:
        if self._is_closed:
            raise InvalidStateError("this store object was closed: open a new one")
        found = self._connection
        if found is None or found.pid != os.getpid():
            # Two threads may make one each; the one that is not kept is closed with its object.
            http = httpx.Client(
                headers=self._headers,
                timeout=_TIMEOUT,
                event_hooks={"response": [check_response]},
            )
            found = self._connection = Connection(os.getpid(), http, self._connect(http))
        return found

    @abstractmethod
    def _connect(self, http: httpx.Client) -> Client:
        """The supabase client, which sends through `http`."""
