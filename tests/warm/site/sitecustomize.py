"""Has a job forked from the process of `tests/warm/stack.py`, before anything else is imported.

Python imports this when it starts, where it is on the path.
"""

from __future__ import annotations

import os
import sys


def _main(path: str) -> None:
    from asking import ask

    program = {"-m": "module", "-c": "code"}.get(sys.orig_argv[1], "script")
    name, *arguments = sys.orig_argv[1 if program == "script" else 2 :]
    # What CUDA has set up would not survive the fork.
    ask(path, program, name, arguments, CUDA_VISIBLE_DEVICES="")


def _is_job(arguments: list[str]) -> bool:
    """Whether a job of ours is started, or Python that a worker runs."""
    if arguments[:1] == ["-m"]:
        return arguments[1].startswith("openweights.jobs.")
    is_script = bool(arguments) and (arguments[0] == "-c" or arguments[0].endswith(".py"))
    return is_script and "OPENWEIGHTS_RUN_ID" in os.environ


if "OW_TEST_STACK" in os.environ and _is_job(sys.orig_argv[1:]):
    _main(os.environ["OW_TEST_STACK"])
