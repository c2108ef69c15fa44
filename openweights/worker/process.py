"""The worker's side of the guard: start a job's command under it, stop it, learn how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
SWEEP_ROUNDS = 200
SWEEP_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a job's process ended.

    Attributes:
        exit_code: Negative for a signal; None when its guard was killed, and the job with it.
        was_stopped: It was told to stop before it ended.
    """

    exit_code: int | None
    was_stopped: bool


class GuardedProcess:
    """A shell command that runs under a guard. `output_fd` is its merged stdout and stderr, for the
    caller to read.
    """

    def __init__(
        self,
        script: str,
        *,
        folder: Path,
        env: Mapping[str, str],
        grace_s: float,
        held_fds: Sequence[int] = (),
        marker: str,
        silence_s: float = 0.0,
    ) -> None:
        """Start it.

        Args:
            held_fds: Descriptors that the guard keeps open until nothing of the job is left.
            marker: `NAME=value`, one of `env`, that no other process has: what to know strays by if
                the guard is killed.
            silence_s: The job is killed when this process is stopped for longer; 0 for never.
        """
        self._marker = marker
        self._lock = threading.Lock()
        self._was_asked = False
        status_fd, guard_status_fd = os.pipe()
        try:
            # -I and -S: neither a module in the job's folder nor PYTHONPATH may reach the guard.
            self._guard = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(GUARD),
                    str(guard_status_fd),
                    str(grace_s),
                    script,
                    str(silence_s),
                ],
                cwd=folder,
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(guard_status_fd, *held_fds),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(status_fd)
            raise
        finally:
            os.close(guard_status_fd)
        self._status_fd = status_fd
        assert self._guard.stdout is not None
        self.output_fd = self._guard.stdout.fileno()
        self._ended = threading.Event()
        if silence_s:
            threading.Thread(target=self._pulse, args=(silence_s / 5,), daemon=True).start()

    def stop(self) -> None:
        """SIGTERM to the job's process group, SIGKILL after the grace. Returns at once."""
        self._ask(b"T")

    def kill(self) -> None:
        """SIGKILL to every process of the job. Returns at once."""
        self._ask(b"K")

    def wait(self) -> ProcessEnd:
        """Return once no process of the job is left."""
        self._guard.wait()
        self._ended.set()
        with open(self._status_fd, "rb") as pipe:
            lines = [line.split() for line in pipe.read().splitlines()]
        self._close_control()
        report = {line[0]: line[1:] for line in lines if line}
        if b"ended" in report:
            exit_code, was_stopped = report[b"ended"]
            return ProcessEnd(int(exit_code), was_stopped == b"1")
        if b"started" in report:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(report[b"started"][0]), signal.SIGKILL)
        kill_strays(self._marker)
        return ProcessEnd(None, was_stopped=self._was_asked)

    def close(self) -> None:
        """Close the output; call it when all of it has been read."""
        if self._guard.stdout is not None:
            self._guard.stdout.close()

    def _pulse(self, pause_s: float) -> None:
        """A thread of its own: a call that hangs in the network is no reason to end the job."""
        while not self._ended.wait(pause_s):
            with self._lock, contextlib.suppress(OSError, ValueError):
                if self._guard.stdin is not None:
                    self._guard.stdin.write(b".")

    def _ask(self, request: bytes) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # it has ended
            self._was_asked = True
            if self._guard.stdin is not None:
                self._guard.stdin.write(request)

    def _close_control(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._guard.stdin is not None:
                self._guard.stdin.close()


def marked_processes(marker: str) -> list[int]:
    """Processes, other than this one, that were started with `marker` (`NAME=value`) in their
    environment; Linux only.
    """
    wanted = marker.encode()
    found: list[int] = []
    names = os.listdir("/proc") if sys.platform == "linux" else []
    for pid in (int(name) for name in names if name.isdigit()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if pid != os.getpid() and wanted in file.read().split(b"\0"):
                found.append(pid)
    return found


def kill_strays(marker: str) -> int:
    """SIGKILL every marked process until none is left; returns how many were signalled.

    For runs whose guard was killed. A guard that lives knows its descendants better than the
    environment does.
    """
    killed: set[int] = set()
    for _ in range(SWEEP_ROUNDS):
        strays = marked_processes(marker)
        if not strays:
            break
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(SWEEP_PAUSE_S)
    return len(killed)
