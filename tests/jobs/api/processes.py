"""Processes of a test's store, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil


def ours() -> list[psutil.Process]:
    """Processes that belong to this test's store."""
    home = f"OPENWEIGHTS_HOME={os.environ['OPENWEIGHTS_HOME']}".encode()
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if process.pid != os.getpid() and home in environment.split(b"\0"):
                found.append(process)
    return found


def running(module: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in ours():
        with contextlib.suppress(psutil.Error):
            if any(module in part for part in process.cmdline()):
                found.append(process)
    return found


def is_free(url: str) -> bool:
    place = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((str(place.hostname), int(place.port or 0))) != 0
