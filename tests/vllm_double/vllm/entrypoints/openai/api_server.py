"""What a deployment sees of `vllm serve`: its options, key, health, counters, and answers.

Its answers tell how it was started, so that a test can ask.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host")
    for name in ("port", "max-model-len", "max-num-seqs", "max-lora-rank", "max-loras"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tensor-parallel-size", "pipeline-parallel-size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in ("quantization", "kv-cache-dtype", "chat-template"):
        parser.add_argument(f"--{name}")
    for name in ("enable-prefix-caching", "enable-lora"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    return parser.parse_args()


ASKED = options()
ADAPTERS = [module.partition("=")[0] for module in ASKED.lora_modules]
MODELS = [*(ASKED.served_model_name or [ASKED.model]), *ADAPTERS]
counts = {"answered": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, "")
        elif self.path == "/metrics":
            labels = 'handler="/v1/chat/completions",method="POST",status="2xx"'
            self._send(200, f"http_requests_total{{{labels}}} {counts['answered']}.0\n")
        elif not self._has_key():
            self._send(401, {"error": "Unauthorized"})
        else:
            self._send(200, {"object": "list", "data": [{"id": name} for name in MODELS]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            self._send(401, {"error": "Unauthorized"})
            return
        if body["model"] not in MODELS:
            self._send(404, {"error": {"message": f"no model {body['model']}"}})
            return
        counts["answered"] += 1
        told = json.dumps({**vars(ASKED), "argv": sys.argv})
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": told},
            "finish_reason": "stop",
        }
        shell = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        self._send(200, {**shell, "choices": [choice]})

    def _has_key(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"

    def _send(self, status: int, body: Any) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer.allow_reuse_address = True
    ThreadingHTTPServer((ASKED.host, ASKED.port), Handler).serve_forever()
