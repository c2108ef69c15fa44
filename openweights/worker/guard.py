"""A process between the worker and a job, so that nothing of the job outlives its run, whoever is
killed.

Started as a plain script (`python -I -S guard.py …`, standard library only, a few milliseconds) in
a session of its own. It runs the job's command in a process group below it and ends only when every
process of the job is gone:

- Standard input is a pipe from the worker. `T` asks to stop: SIGTERM to the job's group, and
  SIGKILL to whatever is left after the grace. `K`, or the end of the pipe because the worker died,
  is SIGKILL at once.
- A worker that shares its store with other machines sends a `.` again and again. When none has come
  for as long as its lease is, it is stopped or hangs: somebody else may have the job by now, and
  this one is killed.
- On Linux the guard is the *subreaper* of the job: a process that daemonises itself becomes the
  guard's child, not init's, so "no children left" means that no process of the job is left.
  Elsewhere the process group has to do.
- When the guard itself is killed, the kernel kills the job's shell with it (PR_SET_PDEATHSIG); the
  worker kills the rest of the group, and what is marked by its environment (`process.py`).
- It holds the descriptors it inherits (the store's liveness lock, the lock of the job's folder)
  until it ends, so a job is not given to another worker while processes of the old run exist. The
  job does not get them: one that escaped from everything would otherwise keep a dead worker alive.

It reports on a pipe of its own: `started <pid>`, then `ended <exit code, or -signal> <1 if it was
told to stop, else 0>`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

LINGER_S = 2.0  # from SIGTERM to SIGKILL for what the job left behind when it ended by itself
POLL_S = 0.02
GIVE_UP_S = (
    60.0  # what SIGKILL has not ended by then is stuck in the kernel, or is not ours to kill
)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IS_LINUX = sys.platform == "linux"


def main(arguments: list[str]) -> int:
    """`guard.py <status descriptor> <grace in seconds> <shell command> <seconds of silence that the
    worker may keep, 0 for any>`, with the worker's pipe as standard input.
    """
    status_fd, grace_s, script = int(arguments[0]), float(arguments[1]), arguments[2]
    silence_s = float(arguments[3])
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    Guard(control_fd=0, status_fd=status_fd, grace_s=grace_s, silence_s=silence_s).run(script)
    return 0


class Guard:
    """The guard's loop: wait for the job, the worker or the clock, and act on what happened."""

    def __init__(
        self, control_fd: int, status_fd: int, grace_s: float, silence_s: float = 0.0
    ) -> None:
        self._control_fd: int | None = control_fd
        self._status_fd = status_fd
        self._grace_s = grace_s
        self._silence_s = silence_s
        self._heard_at = time.monotonic()  # which stands still while the whole machine sleeps
        self._job = 0
        self._exit_code: int | None = None
        self._has_children = True
        self._was_stopped = False
        self._kill_at: float | None = None

    def run(self, script: str) -> None:
        """Run `script` and return when no process of it is left."""
        wake_fd, write_fd = os.pipe()
        os.set_blocking(wake_fd, False)
        os.set_blocking(write_fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._job = _start(script)
        self._report(f"started {self._job}")
        while self._is_anything_left() and self._enforce():
            self._wait(wake_fd)
        exit_code = -signal.SIGKILL if self._exit_code is None else self._exit_code
        self._report(f"ended {exit_code:d} {self._was_stopped:d}")

    def _is_anything_left(self) -> bool:
        while self._has_children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._has_children = False
                break
            if pid == 0:
                return True
            if pid == self._job:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return not IS_LINUX and _group_exists(self._job)

    def _enforce(self) -> bool:
        """Kill what is due; False once it is clear that killing does not help."""
        now = time.monotonic()
        if self._kill_at is None and 0 < self._silence_s < now - self._heard_at:
            self._was_stopped |= self._exit_code is None
            self._kill_at = now
        if self._kill_at is None and self._exit_code is not None:
            self._signal_all(signal.SIGTERM)
            self._kill_at = now + LINGER_S
        if self._kill_at is None or now < self._kill_at:
            return True
        self._signal_all(signal.SIGKILL)
        if now < self._kill_at + GIVE_UP_S:
            return True
        left = descendants(os.getpid()) if IS_LINUX else [self._job]
        os.write(2, f"[openweights] processes {left} could not be killed\n".encode())
        return False

    def _wait(self, wake_fd: int) -> None:
        watched = [wake_fd] if self._control_fd is None else [wake_fd, self._control_fd]
        timeout_s = POLL_S if self._kill_at is not None else self._silence_s / 4 or None
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if wake_fd in ready:
            os.read(wake_fd, 4096)
        if self._control_fd is not None and self._control_fd in ready:
            self._obey(os.read(self._control_fd, 64))

    def _obey(self, request: bytes) -> None:
        self._heard_at = time.monotonic()
        if request and not request.strip(b"."):
            return
        self._was_stopped |= self._exit_code is None
        now = time.monotonic()
        if not request:
            self._control_fd = None
        if not request or b"K" in request:
            self._kill_at = now
        elif self._kill_at is None and self._exit_code is None:
            self._kill_at = now + self._grace_s
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._job, signal.SIGTERM)

    def _signal_all(self, signum: int) -> None:
        # Once the job's own process is reaped, its number may be somebody else's: then the group is
        # not touched on Linux.
        if self._exit_code is None or not IS_LINUX:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._job, signum)
        for pid in descendants(os.getpid()) if IS_LINUX else []:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signum)

    def _report(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the worker may be gone
            os.write(self._status_fd, f"{line}\n".encode())


def descendants(root: int) -> list[int]:
    """Processes below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # The command's name, in parentheses, may itself hold spaces and parentheses.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(children.get(root, []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of a group that holds nothing but zombies
        return False
    return True


def _prctl(option: int, value: int) -> None:
    if IS_LINUX:
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _start(script: str) -> int:
    guard = os.getpid()
    pid = os.fork()
    if pid:
        # On both sides of the fork, so that the group is there whichever goes on first.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # killed before the line above took effect
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execv("/bin/sh", ["sh", "-c", script])
    except BaseException as error:  # noqa: BLE001 - the child of a fork must never return into the guard's loop
        os.write(2, f"[openweights] cannot start the job: {error}\n".encode())
    os._exit(126)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
