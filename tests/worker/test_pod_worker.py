"""What a worker does differently in a cluster's pod: its id, its notice, its end, its GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.errors import ConfigurationError
from openweights.settings import ClusterSettings, Settings
from openweights.worker import gpu_health
from openweights.worker.gpu_reclaim import holders, reclaim
from tests.waiting import HANGS_S, NEVER_S, comes_true
from tests.worker.harness import Jobs

StartWorker = Callable[..., "subprocess.Popen[bytes]"]
STUBBORN = "trap '' TERM; echo up; sleep 9999 & wait; wait; wait"


def test_it_is_the_worker_of_its_row(
    backend: Backend, jobs: Jobs, start_worker: StartWorker
) -> None:
    pod = {
        "WORKER_ID": "worker-of-a-pod",
        "DOCKER_IMAGE": "openweights/ow-unsloth:1.0",
        "OPENWEIGHTS_CLOUD_TYPE": "COMMUNITY",
        "RUNPOD_POD_ID": "pod-1",
    }
    job = jobs.submit("true")
    start_worker("--once", **pod)
    assert jobs.wait_for_end(job) == "completed"
    (worker,) = backend.list_workers()
    assert (worker.id, worker.pod_id) == ("worker-of-a-pod", "pod-1")
    assert (worker.docker_image, worker.cloud_type) == (pod["DOCKER_IMAGE"], "COMMUNITY")


@pytest.mark.parametrize("has_notice", [True, False], ids=["notice", "control"])
def test_a_job_is_handed_back_before_the_machine_is_gone(
    jobs: Jobs, start_worker: StartWorker, has_notice: bool
) -> None:
    """The job would not end by itself, and its usual grace is longer than the machine's notice."""
    job = jobs.submit(STUBBORN)
    env = {"OPENWEIGHTS_CANCEL_GRACE_S": str(NEVER_S)}
    process = start_worker(**env, **({"OPENWEIGHTS_NOTICE_S": "3"} if has_notice else {}))
    jobs.wait_for_log(job, b"up")
    signaled_at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    within_s = HANGS_S if has_notice else 5.0
    assert comes_true(lambda: jobs.status(job) == "pending", within_s) == has_notice
    if has_notice:
        assert time.monotonic() - signaled_at >= 0.9, "it had some time for saving"
        assert process.wait(timeout=HANGS_S) == 0
        assert jobs.error(job) == "its worker was shut down, not counted"


def test_its_time_to_live(jobs: Jobs, start_worker: StartWorker) -> None:
    job = jobs.submit("sleep 4")
    process = start_worker(TTL_HOURS=str(3 / 3600))
    assert process.wait(timeout=HANGS_S) == 0
    assert jobs.status(job) == "completed", "a job is not cut short"


def test_settings_of_a_pod_and_a_manager() -> None:
    assert Settings.from_env({}).pod.worker_id is None
    with pytest.raises(ConfigurationError, match="must be SECURE or COMMUNITY"):
        Settings.from_env({"OPENWEIGHTS_CLOUD_TYPE": "ALL"})
    env = {"RUNPOD_API_KEY": "rp-secret", "OPENWEIGHTS_POD_ENV": " A, B", "A": "1", "B": "2"}
    cluster = ClusterSettings.from_env(env)
    assert cluster.pod_env == {"A": "1", "B": "2"}
    assert "rp-secret" not in repr(cluster)
    for names in ("RUNPOD_API_KEY", "A,OPENWEIGHTS_API_KEY"):
        with pytest.raises(ConfigurationError, match="must not enter a pod"):
            ClusterSettings.from_env({**env, "OPENWEIGHTS_POD_ENV": names})
    with pytest.raises(ConfigurationError, match="C is not set"):
        ClusterSettings.from_env({**env, "OPENWEIGHTS_POD_ENV": "C"})


# ---- GPUs, as an nvidia-smi of ours tells of them ------------------------------------------------


def install_smi(folder: Path, answer: str, name: str = "nvidia-smi") -> dict[str, str]:
    """An `nvidia-smi` that prints the fields asked for, out of `index total used temperature ecc`
    rows in a file.
    """
    folder.mkdir(exist_ok=True)
    (folder / "rows").write_text(answer)
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "names = dict(zip(('index', 'memory.total', 'memory.used', 'temperature.gpu',\n"
        "    'ecc.errors.uncorrected.volatile.total', 'uuid', 'name'), range(7)))\n"
        "fields = sys.argv[1].partition('=')[2].split(',')\n"
        f"for row in pathlib.Path({str(folder / 'rows')!r}).read_text().splitlines():\n"
        "    cells = (row.split() + ['GPU-1', 'NVIDIA H200'])\n"
        "    print(', '.join(cells[names[field]] for field in fields))\n"
    )
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("0 81559 10 40 0\n1 81559 10 41 0", None),
        ("0 81559 10 [N/A] [N/A]", None),
        ("0 81559 10 40 0\n1 81559 10 40 3", "GPU 1 has 3 uncorrected memory errors"),
        ("0 81559 10 97 0", "GPU 0 has 97 °C"),
        ("0 81559 60000 40 0", "GPU 0 has only 21559 of 81559 MiB free"),
        ("nonsense", None),
    ],
)
def test_health(tmp_path: Path, rows: str, says: str | None) -> None:
    found = gpu_health.problem(install_smi(tmp_path / "bin", rows))
    assert found is None if says is None else (found or "").startswith(says)


def test_without_nvidia_smi_nothing_is_refused(tmp_path: Path) -> None:
    assert gpu_health.problem({"PATH": str(tmp_path)}) is None
    assert reclaim({"PATH": str(tmp_path)}) is None


def test_holders_are_found_by_their_open_files(tmp_path: Path) -> None:
    device = tmp_path / "nvidia0"
    device.touch()
    code = f"import time; f = open({str(device)!r}); print('up', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
        with device.open():
            assert holders(str(tmp_path / "nvidia")) == [holder.pid], "never this process itself"
        assert holders(str(tmp_path / "amd")) == []
    finally:
        holder.kill()
        holder.communicate()


def test_memory_that_is_not_freed(tmp_path: Path) -> None:
    env = install_smi(tmp_path / "bin", "0 81559 60000 40 0")
    found = reclaim(env, patience_s=0.2)
    assert found is not None and "nothing in this machine that could be ended holds it" in found


@pytest.mark.parametrize("is_pod", [True, False], ids=["pod", "own machine"])
def test_a_pod_with_a_broken_gpu_ends_before_it_holds_a_job(
    tmp_path: Path, jobs: Jobs, start_worker: StartWorker, is_pod: bool
) -> None:
    env = install_smi(tmp_path / "bin", "0 81559 10 40 7")
    job = jobs.submit("true")
    process = start_worker("--once", **env, **({"WORKER_ID": "w1"} if is_pod else {}))
    assert process.wait(timeout=HANGS_S) == int(is_pod)
    assert jobs.status(job) == ("pending" if is_pod else "completed")
    assert jobs.attempts(job) == (0 if is_pod else 1)


def test_a_pod_whose_gpu_breaks_hands_its_job_back_and_ends(
    tmp_path: Path, jobs: Jobs, start_worker: StartWorker
) -> None:
    env = install_smi(tmp_path / "bin", "0 81559 10 40 0")
    first = jobs.submit("true")
    process = start_worker(**env, WORKER_ID="w1", OPENWEIGHTS_WORKER_IDLE_S="60")
    assert jobs.wait_for_end(first) == "completed"
    (tmp_path / "bin/rows").write_text("0 81559 10 40 7")
    second = jobs.submit("true")
    assert process.wait(timeout=HANGS_S) == 0
    assert jobs.status(second) == "pending"
    assert "7 uncorrected memory errors" in (jobs.error(second) or "")


@pytest.mark.parametrize("is_pod", [True, False], ids=["pod", "control"])
def test_a_pod_that_no_manager_looks_after_does_not_wait_for_ever(
    start_worker: StartWorker, is_pod: bool
) -> None:
    env = {"OPENWEIGHTS_WORKER_IDLE_S": "0.5", **({"WORKER_ID": "w1"} if is_pod else {})}
    process = start_worker(**env)
    assert comes_true(lambda: process.poll() == 0, HANGS_S if is_pod else 3.0) == is_pod
