"""A Hugging Face hub of one repository on this machine: the few routes that a download uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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


def _tree_entry(path: Path) -> dict[str, str | int]:
    content = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path.name, "size": len(content), "oid": oid}
