"""Learns how the program of a script ends: by itself, with an exit code, or by an exception."""

from __future__ import annotations

import dis
import sys
import threading
from types import FrameType, TracebackType
from typing import NoReturn


class ScriptEnd:
    """Watches `sys.excepthook` and `sys.exit` from now on, and passes on what reaches them.

    `raise SystemExit(…)` reaches neither, so it counts as a good end; `sys.exit(…)` does not.
    """

    def __init__(self) -> None:
        self._uncaught: BaseException | None = None
        self._exit: SystemExit | None = None
        self._outermost: FrameType | None = None
        self._next_hook, self._next_exit = sys.excepthook, sys.exit
        sys.excepthook, sys.exit = self._on_exception, self._on_exit

    def error(self) -> str | None:
        """What has ended the program, in a line; None for a good end. To be asked at exit."""
        error = self._uncaught
        if error is None and self._outermost is not None and not _has_returned(self._outermost):
            error = self._exit
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            return None
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}" if text else type(error).__name__

    def restore(self) -> None:
        """Put back what was there, unless somebody has put something else there since."""
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._next_hook
        if sys.exit == self._on_exit:
            sys.exit = self._next_exit

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not hasattr(sys, "ps1"):  # an interactive session goes on
            self._uncaught = error
        self._next_hook(kind, error, traceback)

    def _on_exit(self, code: str | int | None = None, /) -> NoReturn:
        # In another thread it ends that thread.
        if threading.current_thread() is threading.main_thread():
            self._exit = SystemExit(code)
            frame: FrameType | None = sys._getframe()  # pyright: ignore[reportPrivateUsage]
            while frame is not None:
                self._outermost, frame = frame, frame.f_back
        self._next_exit(code)
        raise AssertionError("sys.exit has returned")


def _has_returned(frame: FrameType) -> bool:
    """Whether it came to its end, so that something has caught the SystemExit."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")
