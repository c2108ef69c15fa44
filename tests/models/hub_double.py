"""A Hugging Face hub on this machine: the few routes that a download uses, and those of a push."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repository: str, folder: Path | Mapping[str, Path]) -> Iterator[str]:
    """Serve the files of `folder` as `repository`; gives the endpoint.

    Args:
        folder: Or one for each commit, of which the last is what the branch main has; more may
            come to it meanwhile.
    """
    folders = {COMMIT: folder} if isinstance(folder, Path) else folder

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            prefix = f"/{repository}/resolve/"
            commit = next((one for one in folders if one in path), list(folders)[-1])
            folder = folders[commit]
            names = sorted(item.name for item in folder.iterdir())
            if path.startswith(f"/api/models/{repository}/tree/"):
                body = json.dumps([_tree_entry(folder / name) for name in names]).encode()
            elif path.startswith(f"/api/models/{repository}"):
                info = {"id": repository, "sha": commit, "private": False, "tags": []}
                siblings = [{"rfilename": name} for name in names]
                body = json.dumps({**info, "siblings": siblings}).encode()
            elif path.startswith(prefix) and (folder / path.rsplit("/", 1)[1]).is_file():
                body = (folder / path.rsplit("/", 1)[1]).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Pushes:
    """What was pushed to a hub.

    Attributes:
        commits: The files of each, in the order in which they came.
        arrived: A commit has come.
        may_answer: Until this is set commits are kept, and not answered.
    """

    endpoint: str = ""
    commits: list[dict[str, bytes]] = field(default_factory=list[dict[str, bytes]])
    arrived: Event = field(default_factory=Event)
    may_answer: Event = field(default_factory=Event)


@contextmanager
def serve_pushes() -> Iterator[Pushes]:
    """A hub that takes every push to every repository."""
    pushes = Pushes()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self._body()
            path = urlsplit(self.path).path
            answer: dict[str, object] = {"errors": [], "warnings": []}
            if path == "/api/repos/create":
                answer = {"url": f"{pushes.endpoint}/lab/{json.loads(body)['name']}"}
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(body)["files"]]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": name, **mode} for name in names]}
            elif "/commit/" in path:
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                pushes.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
                pushes.arrived.set()
                pushes.may_answer.wait()
                where = path.removeprefix("/api/models/").partition("/commit/")[0]
                answer = {"commitOid": COMMIT, "commitUrl": f"{pushes.endpoint}/{where}/commit/1"}
            self._say(answer)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _say(self, answer: dict[str, object]) -> None:
            content = json.dumps(answer).encode()
            with suppress(OSError):  # nobody may be there any more
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pushes.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield pushes
    finally:
        pushes.may_answer.set()
        server.shutdown()
        server.server_close()


def _tree_entry(path: Path) -> dict[str, str | int]:
    content = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path.name, "size": len(content), "oid": oid}
