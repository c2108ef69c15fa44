"""OpenAI's API on this machine, as far as jobs use it: chat completions, files and batches.

An answer is the last message in capitals, unless a test wants another, so that it
knows which one it belongs to.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-double"


class OpenAIDouble:
    """The server; a context manager.

    Attributes:
        bodies: Requests for completions, those of batches too.
        faults: Statuses that the next requests get instead of an answer.
        batches: By id; `polls_left` more looks find it in progress.
        reply: What is answered to the last message.
        lines_to_lose: Rows of a batch, by custom id, that have no answer in its output.
    """

    def __init__(self, polls: int = 1) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.faults: list[int] = []
        self.batches: dict[str, dict[str, Any]] = {}
        self.reply: Callable[[str], str] = str.upper
        self.lines_to_lose: set[str] = set()
        self.at_once = self.most_at_once = 0
        self._polls = polls
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()
        double = self

        class Handler(_Handler):
            owner = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> OpenAIDouble:
        threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---- what it does

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self.bodies.append(body)
        said = self.reply(str(body["messages"][-1]["content"]))
        logprobs = {
            "content": [{"token": said, "logprob": -0.5, "bytes": None, "top_logprobs": []}]
        }
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": f"{said}{'!' * index}"},
                "logprobs": logprobs if body.get("logprobs") else None,
                "finish_reason": "stop",
            }
            for index in reversed(range(body.get("n") or 1))
        ]
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        shell = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        return {**shell, "choices": choices, "usage": usage}

    def keep(self, content: bytes) -> dict[str, Any]:
        file_id = f"file-{uuid.uuid4().hex[:8]}"
        self._files[file_id] = content
        shell = {"object": "file", "bytes": len(content), "created_at": 0, "filename": "a"}
        return {"id": file_id, **shell, "purpose": "batch", "status": "processed"}

    def content(self, file_id: str) -> bytes:
        return self._files[file_id]

    def start_batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
        batch_id = f"batch_{uuid.uuid4().hex[:8]}"
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "created_at": 0,
            "status": "in_progress",
            "polls_left": self._polls,
            **asked,
        }
        return self.batches[batch_id]

    def look_at(self, batch_id: str) -> dict[str, Any]:
        batch = self.batches[batch_id]
        if batch["status"] == "in_progress":
            batch["polls_left"] -= 1
            if batch["polls_left"] < 0:
                batch |= {"status": "completed", "output_file_id": self._finish(batch)}
        return batch

    def _finish(self, batch: dict[str, Any]) -> str:
        lines: list[str] = []
        # In another order, as the real one may answer.
        for line in reversed(self.content(batch["input_file_id"]).splitlines()):
            row = json.loads(line)
            assert (row["method"], row["url"]) == ("POST", batch["endpoint"])
            status = 500 if row["custom_id"] in self.lines_to_lose else 200
            response = {"status_code": status, "body": self.complete(row["body"])}
            lines.append(json.dumps({"custom_id": row["custom_id"], "response": response}))
        return str(self.keep("\n".join(lines).encode())["id"])


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIDouble
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.removeprefix("/v1").split("?")[0]
        match path.strip("/").split("/"):
            case ["batches", batch_id]:
                self._answer(lambda: self.owner.look_at(batch_id))
            case ["files", file_id, "content"]:
                self._answer(lambda: self.owner.content(file_id))
            case _:
                self._send(404, {"error": {"message": f"no {path}"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.removeprefix("/v1")
        if path == "/files":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
            parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)]
            [content] = [rest for head, _, rest in parts if b'name="file"' in head]
            self._answer(lambda: self.owner.keep(content.removesuffix(b"\r\n")))
        elif path == "/batches":
            self._answer(lambda: self.owner.start_batch(json.loads(body)))
        else:
            self._answer(lambda: self._counted(json.loads(body)))

    def _counted(self, body: dict[str, Any]) -> dict[str, Any]:
        owner = self.owner
        owner.at_once += 1
        owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            threading.Event().wait(0.02)
            return owner.complete(body)
        finally:
            owner.at_once -= 1

    def _answer(self, act: Any) -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self._send(401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
        elif self.owner.faults:
            self._send(self.owner.faults.pop(0), {"error": {"message": "by the test"}})
        else:
            self._send(200, act())

    def _send(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
