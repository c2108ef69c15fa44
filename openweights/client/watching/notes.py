"""Words for whoever works with the client: in the log for programs, on screen for people."""

from __future__ import annotations

import logging
import sys
from typing import Any


def tell(logger: logging.Logger, text: str) -> None:
    """Log `text`, and write it on a terminal or into a notebook where nobody sees the log."""
    logger.info("%s", text)
    if not logger.isEnabledFor(logging.INFO) and is_watched():
        sys.stderr.write(f"{text}\n")


def tell_last(logger: logging.Logger, error: BaseException, text: str) -> None:
    """Have `text` follow the traceback of `error`, which is raised on: written before, it would be
    pushed off the screen. The command line, which shows no traceback, writes it as well. Where one
    wait is within another, what the outer one says holds.
    """
    error.__notes__ = [text]
    # Not every notebook shows what was added.
    logger.log(logging.INFO if notebook_display() is None else logging.WARNING, "%s", text)


def is_watched() -> bool:
    """Whether somebody reads what is written to stderr while it is written."""
    return notebook_display() is not None or sys.stderr.isatty()


def notebook_display() -> Any:
    """The `display` of IPython where a kernel runs this process, which has loaded it."""
    ipython = sys.modules.get("IPython")
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
        return None
    return sys.modules["IPython.display"].display
