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
        program = {"-m": "module", "-c": "code"}.get(sys.orig_argv[1], "script")
        name, *arguments = sys.orig_argv[1 if program == "script" else 2 :]
        asked = {program: name, "arguments": arguments, "cwd": os.getcwd()}
        content = json.dumps({**asked, "env": dict(os.environ)}).encode() + b"\n"
        socket.send_fds(connection, [content], [0, 1, 2])
        answer = connection.recv(16)
    if answer:
        os._exit(int(answer))
    os.kill(os.getpid(), signal.SIGKILL)


def _is_job(arguments: list[str]) -> bool:
    """Whether a job of ours is started, or Python that a worker runs."""
    if arguments[:1] == ["-m"]:
        return arguments[1].startswith("openweights.jobs.")
    is_script = bool(arguments) and (arguments[0] == "-c" or arguments[0].endswith(".py"))
    return is_script and "OPENWEIGHTS_RUN_ID" in os.environ


if "OW_TEST_STACK" in os.environ and _is_job(sys.orig_argv[1:]):
    _main(os.environ["OW_TEST_STACK"])
