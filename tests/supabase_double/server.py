"""A double of Supabase projects over HTTP, in a process of its own.

`python -m tests.supabase_double.server DSN FOLDER` serves each database of a PostgreSQL server as a
project, at `http://127.0.0.1:<port>/<database>`, and prints its port. What goes wrong on the way is
set with a POST to `/_control/<database>`, whose GET tells what was asked for: see `Faults`.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.supabase_double.objects import Storage, Stored, send
from tests.supabase_double.rest import MAX_ROWS, Answer, Database, HttpError, serve_rest

ANON_KEY = "sb_publishable_double"


@dataclass
class Faults:
    """What goes wrong, until it is set otherwise.

    Attributes:
        is_down: Every request is met with a reset of its connection, and not carried out.
        down_for: The same for the requests of one key only.
        drop_answers: Share of the requests that are carried out, and whose answer is not sent.
        statuses: What the next requests are answered with, before anything is done.
        retry_after_s: Sent with those.
        cut_downloads: Bytes after which downloads break off; 0 for never.
        max_rows: The project's cap on the rows of one answer.
        most_bytes: The project's limit for one file.
    """

    is_down: bool = False
    down_for: str | None = None
    drop_answers: float = 0.0
    statuses: list[int] = field(default_factory=list[int])
    retry_after_s: int | None = None
    cut_downloads: int = 0
    max_rows: int = MAX_ROWS
    most_bytes: int = 50 << 20


class Project:
    """One database served, with its faults and a record of the requests."""

    def __init__(self, dsn: str, folder: Path, name: str) -> None:
        self.name = name
        self.database = Database(dsn, name)
        self.storage = Storage(self.database, folder / name)
        self.faults = Faults()
        self.requests: list[tuple[float, str]] = []
        self.dropped = 0
        self._lock = threading.Lock()
        self._random = random.Random(name)

    def control(self, changes: Mapping[str, Any]) -> None:
        for known in fields(Faults):
            if known.name in changes:
                setattr(self.faults, known.name, changes[known.name])
        self.storage.most_bytes = self.faults.most_bytes
        if changes.get("forget"):
            self.requests.clear()
            self.dropped = 0

    def report(self) -> dict[str, Any]:
        return {"requests": list(self.requests), "dropped": self.dropped}

    def next_status(self) -> int | None:
        with self._lock:
            return self.faults.statuses.pop(0) if self.faults.statuses else None

    def note(self, what: str) -> None:
        self.requests.append((time.time(), what))

    def loses_answer(self) -> bool:
        with self._lock:
            is_lost = self._random.random() < self.faults.drop_answers
            self.dropped += is_lost
            return is_lost


class Double(ThreadingHTTPServer):
    """The server; a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, dsn: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._dsn = dsn
        self._folder = folder
        self._projects: dict[str, Project] = {}
        self._lock = threading.Lock()

    def project(self, name: str) -> Project:
        with self._lock:
            if name not in self._projects:
                self._projects[name] = Project(self._dsn, self._folder, name)
            return self._projects[name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Double

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Not a line for each request."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        name, _, path = unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if name == "_control":
            self._control(path, body)
            return
        project = self.server.project(name)
        is_cut_off = self.headers.get("x-ow-key", "") == project.faults.down_for
        if project.faults.is_down or is_cut_off:
            self._reset()
            return
        project.note(f"{self.command} {path}")
        answer = self._answer(project, path, url.query, body)
        if project.loses_answer():
            self._reset()
        else:
            self._send(project, answer)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

    def _answer(self, project: Project, path: str, query: str, body: bytes) -> Answer | Stored:
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            status = project.next_status()
            if status is not None:
                raise HttpError(status, "FAULT", f"the double was told to answer {status}")
            if len(self.headers.get_all("apikey", [])) > 1:  # as Kong's key-auth
                return _json(401, {"message": "Duplicate API key found"})
            if headers.get("apikey") != ANON_KEY:
                return _json(401, {"message": "Invalid API key"})
            service, _, rest = path.partition("/v1/")
            if service == "storage":
                return project.storage.serve(self.command, rest, headers, body)
            if service != "rest":
                raise HttpError(404, "DOUBLE", f"no service at {path}")
            return serve_rest(
                project.database,
                self.command,
                rest,
                parse_qsl(query, keep_blank_values=True),
                headers,
                body,
                max_rows=project.faults.max_rows,
            )
        except HttpError as error:
            answer = _json(error.status, error.body)
            if project.faults.retry_after_s is not None:
                answer.headers["Retry-After"] = str(project.faults.retry_after_s)
            return answer

    def _control(self, name: str, body: bytes) -> None:
        project = self.server.project(name)
        if self.command == "POST":
            project.control(json.loads(body))
        self._send(None, _json(200, project.report()))

    def _send(self, project: Project | None, answer: Answer | Stored) -> None:
        if isinstance(answer, Stored):
            assert project is not None
            self._send_object(project, answer)
            return
        headers = {"content-type": "application/json; charset=utf-8", **answer.headers}
        self._start(answer.status, headers, len(answer.content))
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def _send_object(self, project: Project, stored: Stored) -> None:
        length = stored.size - stored.first
        cut = project.faults.cut_downloads
        self._start(206 if stored.first else 200, {"accept-ranges": "bytes"}, length)
        is_cut = 0 < cut < length
        send(stored, cast(BinaryIO, self.wfile), cut if is_cut else None)
        if is_cut:
            self._reset()

    def _start(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _reset(self) -> None:
        """End the connection as a broken network does: without a goodbye."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value).encode())


if __name__ == "__main__":
    with Double(sys.argv[1], Path(sys.argv[2])) as double:
        sys.stdout.write(f"{double.server_address[1]}\n")
        sys.stdout.flush()
        double.serve_forever()
