"""Pods whose GPUs idle: what counts as idle, that it is said first, and what is ended."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.backends.base import Backend
from openweights.hardware import Hardware
from openweights.settings import PodSettings, Settings
from openweights.worker.gpu_watch import WARN_SHARE, Idleness, utilization, watching
from tests.waiting import HANGS_S, wait_until
from tests.worker.harness import Jobs, WorkerThread

LIMIT_S = 1200.0
looks = st.lists(st.sampled_from([None, 0, 4, 5, 100]), max_size=60)


@given(looks)
def test_only_idleness_without_a_break_ends_a_job(percents: list[int | None]) -> None:
    idleness, idle_s = Idleness(0.0), 0.0
    for number, percent in enumerate(percents, 1):
        idleness = idleness.seen(percent, 30.0 * number, LIMIT_S)
        idle_s = 0.0 if percent is None or percent >= 5 else idle_s + 30.0
        expected = "ended" if idle_s >= LIMIT_S else "busy"
        if expected == "busy" and idle_s >= WARN_SHARE * LIMIT_S:
            expected = "warned"
        assert idleness.state == expected
        if idleness.state == "ended":
            return


def fake_nvidia_smi(folder: Path, percents: str) -> dict[str, str]:
    """An environment whose `nvidia-smi` says that."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    answer = f"case \"$*\" in *utilization.gpu*) printf '{percents}';; esac"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_busiest_gpu_counts(tmp_path: Path) -> None:
    assert utilization(fake_nvidia_smi(tmp_path / "a", "3\\n41\\n")) == 41
    assert utilization(fake_nvidia_smi(tmp_path / "b", "[N/A]\\n")) is None
    assert utilization({"PATH": str(tmp_path / "none")}) is None


def test_it_is_said_before_it_ends(tmp_path: Path) -> None:
    env, calls, ended = fake_nvidia_smi(tmp_path / "bin", "2\\n"), list[str](), threading.Event()

    def warn(left_s: float) -> None:
        calls.append("warned")
        assert 0 < left_s <= 0.5

    with watching(env, 1.0, warn, ended.set):
        assert ended.wait(HANGS_S)
    assert calls == ["warned"]
    ended.clear()
    with watching(fake_nvidia_smi(tmp_path / "bin", "60\\n"), 0.2, warn, ended.set):
        assert not ended.wait(0.6), "the control: it works"


def test_a_job_that_leaves_its_gpus_idle_is_given_back(
    settings: Settings,
    backend: Backend,
    jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a worker in a pod, which ends with it."""
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", "0\\n")["PATH"])
    pod = PodSettings(worker_id="w-pod", idle_gpu_minutes=0.02)
    job = jobs.submit("sleep 9999")
    gpu = Hardware("1x A100", 1, 80)
    with WorkerThread(replace(settings, pod=pod), backend, gpu) as worker:
        wait_until(lambda: worker.exit_code is not None)
    assert (jobs.status(job), jobs.attempts(job), worker.exit_code) == ("pending", 1, 0)
    assert jobs.error(job) == "stopped: its GPUs worked less than 5 % for 0.02 minutes"
    assert [event["type"] for event in jobs.events(job)] == ["idle_gpu"]
