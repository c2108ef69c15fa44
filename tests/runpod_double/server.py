"""RunPod on this machine: an HTTP server that speaks GraphQL and REST v2, with faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.runpod_double import graphql, rest
from tests.runpod_double.pods import MachineRoom


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens instead of an answer.

    Attributes:
        kind: A status to answer with (429, 500, 401 …), `lost` (done, and then a 504), `text` (200
            with something that is no JSON), or a sentence that GraphQL answers as its error.
        retry_after_s: Header of a 429.
    """

    kind: int | str
    retry_after_s: int | None = None


class RunPodDouble:
    """The server and its pods; a context manager.

    `received` holds what was asked for: verb, and of a start the pod as asked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        api_key: str = "rp-account-key",
        command: Sequence[str] | None = None,
        boot_s: float = 0.0,
    ) -> None:
        self.api_key = api_key
        self.room = MachineRoom(folder, command, boot_s)
        self.received: list[tuple[str, dict[str, Any]]] = []
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def started(self) -> list[dict[str, Any]]:
        """Pods that were asked for, whether or not they were to be had."""
        return [asked for verb, asked in self.received if verb == "start"]

    def fail(
        self, verb: str, kind: int | str, *, times: int = 1, retry_after_s: int | None = None
    ) -> None:
        """The next `times` calls of `verb` go wrong."""
        with self._lock:
            self._faults += [(verb, Fault(kind, retry_after_s))] * times

    def __enter__(self) -> RunPodDouble:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.room.close()

    def note(self, verb: str, asked: dict[str, Any]) -> Fault | None:
        """Record a call; the fault that it meets."""
        with self._lock:
            self.received.append((verb, asked))
            for index, (of_verb, fault) in enumerate(self._faults):
                if of_verb == verb:
                    del self._faults[index]
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, double: RunPodDouble) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.double = double


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        url = urlsplit(self.path)
        if self.headers.get("authorization") != f"Bearer {self.server.double.api_key}":
            return self._send(401, {})
        path = [part for part in url.path.split("/") if part]
        if path == ["graphql"]:
            return self._graphql(body["query"])
        return self._rest(path[1:], dict(parse_qsl(url.query)), body)

    do_GET = do_POST = do_DELETE = _serve

    def _graphql(self, query: str) -> None:
        verb, double = graphql.verb_of(query), self.server.double
        try:
            asked = graphql.pod_asked_for(query) if verb == "start" else {}
        except graphql.SyntaxFault as error:
            return self._send(400, {"errors": [{"message": str(error)}]})
        fault = double.note(verb, asked)
        if fault is None:
            return self._send(200, graphql.answer(double.room, query))
        if fault.kind == "lost":
            graphql.answer(double.room, query)
        if isinstance(fault.kind, str) and fault.kind not in ("lost", "text"):
            return self._send(200, {"errors": [{"message": fault.kind}], "data": None})
        return self._fail(fault)

    def _rest(self, path: list[str], query: dict[str, str], body: dict[str, Any]) -> None:
        verb, double = rest.verb_of(self.command, path), self.server.double
        fault = double.note(verb, body if verb == "start" else {})
        if fault is not None and fault.kind != "lost":
            return self._fail(fault)
        status, content = rest.answer(double.room, self.command, path, query, body)
        return self._send(status, content) if fault is None else self._fail(fault)

    def _fail(self, fault: Fault) -> None:
        headers: dict[str, str] = {}
        if fault.retry_after_s is not None:
            headers["Retry-After"] = str(fault.retry_after_s)
        if isinstance(fault.kind, int):
            self._send(fault.kind, "<html>no JSON</html>", headers)
        elif fault.kind == "lost":
            self._send(504, "upstream timeout")
        else:
            self._send(200, "surprise")

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        is_text = isinstance(content, str)
        data = content.encode() if is_text else json.dumps(content).encode()
        data = b"" if content is None else data
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
