"""The machines behind the RunPod double: stock, prices, and pods that are real local processes.

A pod is one command in a process group of its own, with the environment that was asked for and
nothing of the test's own but what a program needs to start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECLAIM_S = 5.0  # from SIGTERM to SIGKILL when a machine is taken back

# id -> memory in GB, USD per hour in the secure and in the community cloud
GPUS: dict[str, tuple[int, float, float]] = {
    "NVIDIA RTX A4500": (20, 0.32, 0.25),
    "NVIDIA GeForce RTX 3090": (24, 0.46, 0.22),
    "NVIDIA A40": (48, 0.44, 0.35),
    "NVIDIA RTX A6000": (48, 0.49, 0.33),
    "NVIDIA L40S": (48, 0.86, 0.79),
    "NVIDIA A100 80GB PCIe": (80, 1.64, 1.19),
    "NVIDIA A100-SXM4-80GB": (80, 1.89, 1.39),
    "NVIDIA H100 80GB HBM3": (80, 2.99, 2.69),
    "NVIDIA H100 NVL": (94, 3.07, 2.59),
    "NVIDIA H200": (141, 3.59, 3.49),
}


class NoStock(Exception):
    """What the real one answers with 'There are no longer any instances available'."""


@dataclass
class PodProcess:
    """A pod: what was asked for, and the process that it is."""

    id: str
    name: str
    image: str
    gpu: str | None
    gpu_count: int
    cloud: str
    env: dict[str, str]
    ports: list[str]
    log: Path
    price: float
    status: str = "PROVISIONING"
    process: subprocess.Popen[bytes] | None = None
    created_at: float = field(default_factory=time.time)

    def refresh(self) -> PodProcess:
        """Notice that the process has ended."""
        if self.status == "RUNNING" and self.process and self.process.poll() is not None:
            self.status = "EXITED"
        return self


class MachineRoom:
    """All pods of one account.

    Args:
        folder: Where pods have their folders and logs.
        command: What a pod runs; a worker by default.
        boot_s: From creation to the start of the process; `inf` for a boot that never ends.
    """

    def __init__(
        self, folder: Path, command: Sequence[str] | None = None, boot_s: float = 0.0
    ) -> None:
        self.folder = folder
        self.command = list(command or [sys.executable, "-m", "openweights.worker.main"])
        self.boot_s = boot_s
        self.stock = {gpu: 4 for gpu in GPUS}
        self.full_places: set[str] = set()
        self.pods: dict[str, PodProcess] = {}
        self._lock = threading.RLock()
        self._timers: list[threading.Timer] = []

    def create(self, asked: dict[str, Any]) -> PodProcess:
        """Take a machine and boot it; raises NoStock."""
        with self._lock:
            pod = self._new_pod(asked)
            self.pods[pod.id] = pod
        if self.boot_s == 0:
            self._boot(pod)
        elif self.boot_s < float("inf"):
            timer = threading.Timer(self.boot_s, self._boot, [pod])
            timer.daemon = True
            self._timers.append(timer)
            timer.start()
        return pod

    def _new_pod(self, asked: dict[str, Any]) -> PodProcess:
        gpu, count = asked.get("gpu"), int(asked.get("gpu_count", 1))
        if gpu is not None:
            if self.stock[gpu] < count or asked.get("place") in self.full_places:
                raise NoStock
            self.stock[gpu] -= count
        price = 0.1 if gpu is None else GPUS[gpu][1 if asked["cloud"] == "SECURE" else 2]
        pod_id = uuid.uuid4().hex[:14]
        folder = self.folder / pod_id
        folder.mkdir(parents=True)
        return PodProcess(
            *(pod_id, asked["name"], asked["image"], gpu, count, asked["cloud"]),
            env=dict(asked["env"]),
            ports=list(asked["ports"]),
            log=folder / "log",
            price=price * count,
        )

    def alive(self) -> list[PodProcess]:
        """Pods that cost money: those that were not terminated."""
        with self._lock:
            pods = list(self.pods.values())
        return [pod.refresh() for pod in pods if pod.status != "TERMINATED"]

    def terminate(self, pod: PodProcess, *, status: str = "TERMINATED", grace_s: float = 0) -> None:
        """End a pod's process and give its machine back."""
        with self._lock:
            if pod.status == "TERMINATED":
                return
            if pod.status != "EXITED" and pod.gpu is not None:
                self.stock[pod.gpu] += pod.gpu_count
            pod.status = status
        if pod.process is not None:
            end_group(pod.process, grace_s)

    def reclaim(self, pod: PodProcess) -> None:
        """Take the machine back as RunPod does: SIGTERM, five seconds, SIGKILL."""
        self.terminate(pod, status="EXITED", grace_s=RECLAIM_S)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for pod in self.alive():
            self.terminate(pod)

    def _boot(self, pod: PodProcess) -> None:
        base = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        env = {
            **base,
            "HOME": str(pod.log.parent),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            **pod.env,
            "RUNPOD_POD_ID": pod.id,
        }
        with self._lock, pod.log.open("ab") as log:
            if pod.status != "PROVISIONING":
                return
            pod.process = subprocess.Popen(
                self.command,
                cwd=pod.log.parent,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            pod.status = "RUNNING"


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to the process group, SIGKILL to what is left after the grace."""
    if process.poll() is None and grace_s > 0:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
