"""Runs programs that a model wrote, each in a process of its own that may do next to nothing.

What holds a program is in `confined.py`; here are the clock, the folder, and what is believed of
the answer. It keeps mistakes and mischief away from the machine: loops, all of the memory, files
elsewhere, other processes, the network. It is no wall against an attacker who knows a fault of the
kernel: for that, run evaluations on a machine of their own, as a pod is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from openweights.jobs.evaluate import confined

logger = logging.getLogger(__name__)

MEASURES = ("resources", "network", "files", "capabilities", "calls")
LOOK_S = 0.05
MOST_ANSWER_BYTES = 4096
MOST_FOLDER_BYTES = 64 << 20
MOST_FILE_BYTES = 16 << 20
# All that the program finds in its environment.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # Libraries that compute would start a thread for each core, and there is only one.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a program may use.

    Attributes:
        seconds: By the clock.
        memory_mb: Of address space, in MiB; the interpreter takes some 20 of it.
    """

    seconds: float = 10.0
    memory_mb: int = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: It came to its end.
        error: Else what went wrong, in one line.
        held: Which of `MEASURES` took effect; none where nothing is known.
    """

    passed: bool
    error: str | None
    held: tuple[str, ...] = ()


def run_program(source: str, bounds: Bounds = Bounds()) -> Outcome:  # noqa: B008 - frozen
    """Run Python source by itself; it passes when it comes to its end without an exception."""
    with tempfile.TemporaryDirectory(prefix="ow-program-", ignore_cleanup_errors=True) as folder:
        return _run(source, bounds, Path(folder).resolve())


def run_programs(sources: Sequence[str], bounds: Bounds = Bounds()) -> list[Outcome]:  # noqa: B008
    """As `run_program`, several at a time: one for each core. Says what does not hold them here."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda source: run_program(source, bounds), sources))
    known = next((outcome.held for outcome in outcomes if outcome.held), None)
    if known is not None and (absent := [name for name in MEASURES if name not in known]):
        logger.warning("this machine cannot confine programs in: %s", ", ".join(absent))
    return outcomes


def _run(source: str, bounds: Bounds, folder: Path) -> Outcome:
    token = secrets.token_hex(16)
    asked = {
        "program": source,
        "token": token,
        "memory_bytes": bounds.memory_mb << 20,
        "cpu_s": int(bounds.seconds) + 1,
        "file_bytes": MOST_FILE_BYTES,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", str(confined.__file__)],
        cwd=folder,
        env={**_ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked, ensure_ascii=True).encode())
            process.stdin.close()
        answer, cut = _listen(process, bounds.seconds, folder)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return Outcome(False, cut) if cut else _read(answer, token, status)


def _listen(
    process: subprocess.Popen[bytes], seconds: float, folder: Path
) -> tuple[bytes, str | None]:
    """What it answers until it ends; or why it is ended."""
    assert process.stdout is not None
    deadline, told = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(min(LOOK_S, max(deadline - time.monotonic(), 0))):
                piece = os.read(process.stdout.fileno(), MOST_ANSWER_BYTES)
                if not piece:
                    return told, None
                told += piece
            if len(told) > MOST_ANSWER_BYTES:
                return told, "it answers without end"
            if time.monotonic() > deadline:
                return told, f"not done within {seconds:g} s"
            if _folder_bytes(folder) > MOST_FOLDER_BYTES:
                return told, f"wrote more than {MOST_FOLDER_BYTES >> 20} MB"


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def _read(answer: bytes, token: str, status: int) -> Outcome:
    """What is believed: an answer with the token alone."""
    try:
        told = json.loads(answer)
        held = tuple(str(name) for name in told["held"])
        error = told["error"]
        is_known = secrets.compare_digest(str(told["token"]), token)
    except (ValueError, KeyError, TypeError):
        is_known, held, error = False, (), None
    if not is_known:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Outcome(False, f"ended by itself before its end ({how})")
    return Outcome(error is None, None if error is None else str(error), held)
