"""Has a job forked from the process of `tests/warm/stack.py`, before anything else is imported.

Python imports this when it starts, where it is on the path.
"""

from __future__ import annotations

import os
import sys


def _main(path: str) -> None:
    """Pass on what this process is told, and end as the fork does."""
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda told, _: connection.sendall(bytes([told])))
        _, _, module, *arguments = sys.orig_argv
        asked = {"module": module, "arguments": arguments, "cwd": os.getcwd()}
        content = json.dumps({**asked, "env": dict(os.environ)}).encode() + b"\n"
        socket.send_fds(connection, [content], [0, 1, 2])
        answer = connection.recv(16)
    if answer:
        os._exit(int(answer))
    os.kill(os.getpid(), signal.SIGKILL)


_IS_JOB = sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("openweights.jobs.")
if _IS_JOB and "OW_TEST_STACK" in os.environ:
    _main(os.environ["OW_TEST_STACK"])
