"""Pods that are worker processes on this machine: the same protocol, and nothing to pay.

A pod is a folder with its name, a lock and the number of a process: the worker holds the lock, and
so tells every manager, also a later one, whether it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from openweights.cluster.planning.market import Listing
from openweights.cluster.planning.observation import Pod
from openweights.cluster.pods.base import NoCapacity, PodRequest, PodsUnavailable
from openweights.errors import OpenWeightsError

LOG_BYTES = 20_000
PAUSE_S = 0.05
# Written by the process itself, so that there is no moment at which only we know it.
_WITH_PID = ("/bin/sh", "-c", 'echo $$ > pid && exec "$@"', "sh")


class LocalPods:
    """`Pods` on this machine.

    Args:
        folder: Where the pods' folders are.
        env: What a process needs on this machine, such as PATH; nothing secret.
        most: Processes at the same time; more would share what the machine has.
        grace_s: From SIGTERM to SIGKILL when a pod is ended.
    """

    name = "local"

    def __init__(
        self, folder: Path, env: Mapping[str, str], *, most: int = 1, grace_s: float = 5.0
    ) -> None:
        self._folder = folder
        self._env = env
        self._most = most
        self._grace_s = grace_s
        # Children of this very process are to be waited for, or they stay as zombies.
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, request: PodRequest) -> Pod:
        """Whatever GPU is asked for: the worker says what there is."""
        pods = self.list_pods()
        for pod in pods:
            if pod.name == request.name:
                return pod
        if sum(pod.is_running for pod in pods) >= self._most:
            raise NoCapacity(f"this machine runs {self._most} workers already")
        pod_id = uuid.uuid4().hex[:14]
        try:
            self._children[pod_id] = self._start_process(self._folder / pod_id, request)
        except OSError as error:
            raise PodsUnavailable(f"cannot start a worker: {error}") from error
        return Pod(pod_id, request.name, "RUNNING", 0.0)

    def list_pods(self) -> list[Pod]:
        found: list[Pod] = []
        for path in sorted(self._folder.glob("*/name")):
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                status = "RUNNING" if self._lives(path.parent) else "EXITED"
                found.append(Pod(path.parent.name, path.read_text("utf-8"), status, 0.0))
        return found

    def terminate(self, pod_id: str, name: str) -> None:
        folder = self._folder / pod_id
        if not any(pod.id == pod_id and pod.name == name for pod in self.list_pods()):
            return
        kill_at = time.monotonic() + self._grace_s
        signum: signal.Signals | None = signal.SIGTERM
        while self._lives(folder):
            self._signal(folder, signum)
            time.sleep(PAUSE_S)
            signum = signal.SIGKILL if time.monotonic() > kill_at else None
        shutil.rmtree(folder, ignore_errors=True)

    def logs(self, pod_id: str) -> str:
        path = self._folder / pod_id / "log"
        try:
            return path.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        except OSError as error:
            raise OpenWeightsError(f"pod {pod_id} has no log: {error.strerror}") from error

    def stock(self) -> list[Listing]:
        return []

    def _start_process(self, folder: Path, request: PodRequest) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True)
        (folder / "name").write_text(request.name, encoding="utf-8")
        with (folder / "lock").open("w") as lock, (folder / "log").open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return subprocess.Popen(
                [*_WITH_PID, sys.executable, "-m", "openweights.worker.main"],
                cwd=folder,
                env={**self._env, **request.env, "OPENWEIGHTS_HOME": str(folder / "home")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )

    def _lives(self, folder: Path) -> bool:
        child = self._children.get(folder.name)
        if child is not None and child.poll() is not None:
            del self._children[folder.name]
        with contextlib.suppress(FileNotFoundError), (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _signal(self, folder: Path, signum: signal.Signals | None) -> None:
        # While the lock is held, the number is that of the process that holds it; it may not have
        # come to writing it down.
        if signum is None or not self._lives(folder):
            return
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.killpg(int((folder / "pid").read_text()), signum)
