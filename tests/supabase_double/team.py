"""An organization in a project, for tests: its keys, its store, its clock, and the faults of the
network to it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg.conninfo import conninfo_to_dict

from openweights.backends.supabase.backend import SupabaseBackend
from openweights.settings import Settings
from tests.supabase_double.postgres import PostgresServer
from tests.supabase_double.server import ANON_KEY, Faults

ROOT = Path(__file__).parents[2]
# The moments that decide whether somebody is alive; a test lets time pass by moving them back.
_MOMENTS = (
    *(("runs", "lease_expires_at"), ("runs", "created_at"), ("runs", "quiet_since")),
    *(("workers", "pinged_at"), ("jobs", "not_before")),
)
# Those that decide what is old.
_PAST = (
    *(("runs", "ended_at"), ("files", "used_at"), ("files", "created_at"), ("jobs", "updated_at")),
    *(("storage.objects", "created_at"), ("storage.objects", "updated_at")),
)


class Team:
    """An organization, and its first admin's key.

    Args:
        dsn: Of the project's database, as the owner.
        server_url: Of the double.

    Attributes:
        url: Of the project, as `SUPABASE_URL`.
    """

    def __init__(self, dsn: str, server_url: str) -> None:
        name = conninfo_to_dict(dsn)["dbname"]
        self._control = f"{server_url}/_control/{name}"
        self._found(dsn, f"{server_url}/{name}", ANON_KEY)

    def _found(self, dsn: str, url: str, anon_key: str) -> None:
        self.url = url
        self.anon_key = anon_key
        self._db = psycopg.connect(dsn, autocommit=True)
        (answer,) = self.execute(
            "select openweights.create_organization('Lab', 'admin@lab.example')"
        )
        self.organization_id: str = answer[0]["organization_id"]
        self.admin_key: str = answer[0]["key"]

    def execute(self, query: str, *values: Any) -> list[Any]:
        """Rows of a query as the database's owner."""
        cursor = self._db.execute(query, values)  # pyright: ignore[reportArgumentType]
        return cursor.fetchall() if cursor.description else []

    def backend(self, key: str | None = None, **options: Any) -> SupabaseBackend:
        return SupabaseBackend(self.url, self.anon_key, key or self.admin_key, **options)

    def settings(self, home: Path, key: str | None = None, **others: Any) -> Settings:
        return Settings(
            home=home,
            api_key=key or self.admin_key,
            supabase_url=self.url,
            supabase_anon_key=self.anon_key,
            **others,
        )

    def set_environment(self, set_variable: Callable[[str, str], object]) -> None:
        """Let this project be the one that the environment names."""
        set_variable("SUPABASE_URL", self.url)
        set_variable("SUPABASE_ANON_KEY", self.anon_key)
        set_variable("OPENWEIGHTS_API_KEY", self.admin_key)

    def key(self, role: str, **options: Any) -> str:
        """A new key of that role."""
        with contextlib.closing(self.backend()) as backend:
            return backend.create_key(f"a {role}", role, **options).key

    def set_timing(self, *, lease_s: float, heartbeat_s: float) -> None:
        query = "update organizations set lease_s = %s, heartbeat_s = %s where id = %s"
        self.execute(query, lease_s, heartbeat_s, self.organization_id)

    def pass_time(self, seconds: float) -> None:
        """Let everybody have been silent for that much longer."""
        self._move_back(_MOMENTS, seconds)

    def age(self, seconds: float) -> None:
        """The same, and all that was done has been done that much earlier."""
        self._move_back((*_MOMENTS, *_PAST), seconds)

    def _move_back(self, moments: Iterable[tuple[str, str]], seconds: float) -> None:
        for table, moment in moments:
            self.execute(f"update {table} set {moment} = {moment} - interval '{seconds} s'")

    def fault(self, **faults: Any) -> None:
        """See `server.Faults`; `forget=True` forgets the requests so far."""
        httpx.post(self._control, json=faults).raise_for_status()

    def report(self) -> dict[str, Any]:
        """`requests` as [moment, "METHOD path"], and how many answers were `dropped`."""
        return httpx.get(self._control).json()

    def moments_of(self, path: str) -> list[float]:
        """When requests with that end of their path came."""
        return [at for at, what in self.report()["requests"] if what.endswith(path)]

    def close(self) -> None:
        """Leave the project without faults to the next one."""
        self.fault(**asdict(Faults()), forget=True)
        self._db.close()


class LiveTeam(Team):
    """The same in a real project, which has no faults to order."""

    def __init__(self, dsn: str, url: str, anon_key: str) -> None:
        self._found(dsn, url, anon_key)

    def close(self) -> None:
        self._db.close()


@contextlib.contextmanager
def running_double(postgres: PostgresServer) -> Iterator[str]:
    """The address of a server that has every database as a project."""
    with tempfile.TemporaryDirectory(prefix="ow-double-") as folder:
        command = [sys.executable, "-m", "tests.supabase_double.server"]
        process = subprocess.Popen(
            [*command, postgres.url("postgres"), folder],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()
            process.wait()
