"""Asks the process of `tests/warm/stack.py` for a fork, and stands for that fork."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence


def ask(path: str, program: str, name: str, arguments: Sequence[str], **env: str) -> None:
    """Pass on what this process is told, and end as the fork does.

    Args:
        path: Of the process's socket.
        program: What `name` is: a `module`, a `script`, or `code`.
        env: Variables besides those of this process.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda told, _: connection.sendall(bytes([told])))
        asked = {program: name, "arguments": arguments, "cwd": os.getcwd()}
        content = json.dumps({**asked, "env": {**os.environ, **env}}).encode() + b"\n"
        socket.send_fds(connection, [content], [0, 1, 2])
        answer = connection.recv(16)
    if answer:
        os._exit(int(answer))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # `python asking.py PATH -u -c CODE`
    ask(sys.argv[1], "code", sys.argv[-1], [])
