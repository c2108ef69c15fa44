"""Pods that are processes here: found again by another manager, ended for sure."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights.cluster.planning.observation import pod_name
from openweights.cluster.pods.base import NoCapacity, PodRequest
from openweights.cluster.pods.local import LocalPods
from openweights.errors import OpenWeightsError
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[3]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def request(worker_id: str) -> PodRequest:
    return PodRequest(pod_name(worker_id), "img", "gpu", 1, "SECURE", {"WORKER_ID": worker_id})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "pods"
    yield folder
    pods = LocalPods(folder, ENV, grace_s=0)
    for pod in pods.list_pods():
        pods.terminate(pod.id, pod.name)


def test_a_worker_lives_in_it(folder: Path) -> None:
    pods = LocalPods(folder, ENV)
    assert pods.list_pods() == [] == pods.stock()
    pod = pods.start(request("w1"))
    assert pods.start(request("w1")).id == pod.id, "looked for first"
    with pytest.raises(NoCapacity, match="runs 1 workers already"):
        pods.start(request("w2"))
    wait_until(lambda: "w1: " in pods.logs(pod.id))
    later = LocalPods(folder, ENV, grace_s=10)  # another manager, after a restart
    assert [(p.id, p.name, p.status) for p in later.list_pods()] == [(pod.id, "ow-w1", "RUNNING")]
    later.terminate(pod.id, "ow-somebody-else")
    assert len(later.list_pods()) == 1
    later.terminate(pod.id, "ow-w1")
    assert later.list_pods() == [] == pods.list_pods()
    later.terminate(pod.id, "ow-w1")
    with pytest.raises(OpenWeightsError, match="has no log"):
        later.logs(pod.id)


def test_one_that_ended_by_itself_stays_until_it_is_ended(folder: Path) -> None:
    pods = LocalPods(folder, ENV)
    pod = pods.start(request("w1"))
    wait_until((folder / pod.id / "pid").exists)
    wait_until((folder / pod.id / "pid").read_text)
    os.killpg(int((folder / pod.id / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: pods.list_pods()[0].status == "EXITED")
    assert pods.start(request("w2")).name == "ow-w2", "its place is free"
    pods.terminate(pod.id, "ow-w1")
    assert [p.name for p in pods.list_pods()] == ["ow-w2"]
