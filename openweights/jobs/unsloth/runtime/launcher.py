"""Makes a job one process for each GPU, and one again to whoever waits for it.

Instead of torchrun, which answers a stop with exit status 1 and a traceback of its own, so that the
last line of the log would no longer tell what happened. No torch here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM  # what a shell reports
POLL_S = 0.1
GRACE_S = 2.0  # from a rank's failure to the end of the others, which would wait for it for ever


def rank() -> int:
    """This process's number; 0 reports and saves."""
    return int(os.environ.get("RANK", "0"))


def launched_ranks() -> int:
    """How many processes were started to train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank() -> bool:
    """Whether this process is one of several already."""
    return "LOCAL_RANK" in os.environ


def run_ranks(processes: int, arguments: Sequence[str]) -> int:
    """Run the training module in so many processes, to their end.

    SIGTERM is passed on. When a rank fails, the others are killed.

    Returns:
        The exit status: 0, that of the rank that failed first, or `EXIT_TERMINATED`.
    """
    stops: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        stops.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        ranks += _start(processes, arguments)
        return _wait(ranks, stops)
    finally:
        for process in ranks:
            process.kill()
        signal.signal(signal.SIGTERM, previous)


def _start(processes: int, arguments: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    command = [sys.executable, "-m", "openweights.jobs.unsloth.training", *arguments]
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)})
        for number in range(processes)
    ]


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stops: list[int]) -> int:
    failure, kill_at, stopping = 0, float("inf"), False
    while any(process.poll() is None for process in ranks):
        if stops and not stopping:
            stopping = True
            for process in ranks:
                process.terminate()
        # One that has stopped leaves the others alone: they may still be saving the checkpoint.
        failures = [code for p in ranks if (code := p.poll()) not in (None, 0, EXIT_TERMINATED)]
        if failures and not failure:
            failure, kill_at = failures[0], time.monotonic() + GRACE_S
        if time.monotonic() >= kill_at:
            for process in ranks:
                process.kill()
        time.sleep(POLL_S)
    codes = [failure, *(process.returncode for process in ranks)]
    first = next((code for code in codes if code), 0)
    return first if first >= 0 else 128 - first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
