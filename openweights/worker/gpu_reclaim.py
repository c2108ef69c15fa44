"""Ends processes that still hold this machine's GPUs when no job should.

A job's processes are gone when its run has ended (`guard.py`). What is found here escaped from all
that, or was started in the pod by hand, and it would make the next job fail for lack of memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from openweights.worker import gpu_health

logger = logging.getLogger(__name__)

DEVICES = "/dev/nvidia"
PATIENCE_S = 60.0  # the driver needs a while to give memory back
PAUSE_S = 1.0


def reclaim(env: Mapping[str, str], *, patience_s: float = PATIENCE_S) -> str | None:
    """Free the memory of the GPUs; what is wrong when that did not help, or None.

    Kills only where memory is short, and never this process or one that it descends from. A holder
    outside of this container cannot be seen, let alone ended: then the machine is not fit.
    """
    found = gpu_health.used_too_much(env)
    if found is None:
        return None
    for pid in holders():
        logger.warning("process %d holds a GPU that no job should hold: it is killed", pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    give_up_at = time.monotonic() + patience_s
    while (found := gpu_health.used_too_much(env)) is not None:
        if time.monotonic() >= give_up_at:
            return f"{found}, and nothing in this machine that could be ended holds it"
        time.sleep(min(PAUSE_S, patience_s))
    return None


def holders(devices: str = DEVICES) -> list[int]:
    """Processes, not ours, that have a file open whose path begins with `devices`; Linux only.

    From the open files, because in a container `nvidia-smi` tells the numbers of processes as the
    host counts them: here they are other processes, or none.
    """
    if sys.platform != "linux":
        return []
    own = _ancestors()
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if pid not in own and _has_open(pid, devices)]


def _has_open(pid: int, devices: str) -> bool:
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}").startswith(devices):
                    return True
    return False


def _ancestors() -> set[int]:
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            # The command's name, in parentheses, may itself hold spaces and parentheses.
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
        except OSError:
            break
        pid = int(stat.split()[1])
    return found
