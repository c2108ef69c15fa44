"""A deployment on a pod: from the client through the doubles of project, RunPod and vLLM, and back
through the double of RunPod's proxy.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from openweights import OpenWeights
from openweights.cluster.launch import open_manager
from openweights.cluster.planning.limits import Limits
from openweights.images import VLLM_IMAGE
from openweights.settings import ClusterSettings
from tests.runpod_double.proxy import PodProxy
from tests.runpod_double.server import RunPodDouble
from tests.supabase_double.team import Team
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from tests.warm.stack import WarmStack

LIMITS = Limits(idle_s=1.5, startup_s=60, unresponsive_s=20, missing_pod_s=5, stopping_s=15)
VLLM = Path(__file__).parents[2] / "vllm_double"
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPodDouble]:
    """RunPod, whose pods have vLLM's double and are reached through the proxy's."""
    with RunPodDouble(tmp_path / "pods") as cloud, PodProxy(cloud.room, tmp_path) as proxy:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", cloud.url)
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        monkeypatch.setenv("SSL_CERT_FILE", str(proxy.certificate))
        yield cloud


@pytest.fixture
def ow(
    team: Team,
    cloud: RunPodDouble,
    home: Path,
    stack: WarmStack,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[OpenWeights]:
    """A client of a project whose manager runs beside the test."""
    team.set_timing(lease_s=10, heartbeat_s=0.5)
    team.set_environment(monkeypatch.setenv)
    env = {**stack.env, "PYTHONPATH": os.pathsep.join([str(VLLM), stack.env["PYTHONPATH"]])}
    cluster = ClusterSettings(cloud.api_key, cloud.url, max_workers=1, pod_env=env)
    stop = threading.Event()
    with open_manager(team.settings(home), cluster, limits=LIMITS) as manager:
        thread = threading.Thread(target=manager.run, args=(stop, 0.3))
        thread.start()
        client = OpenWeights()
        yield client
        client.close()
        stop.set()
        thread.join()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def test_served_by_vllm_on_a_pod(ow: OpenWeights, cloud: RunPodDouble, tmp_path: Path) -> None:
    base = str(make_tiny_model(tmp_path / "base"))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapter = str(tmp_path / "adapter")
    get_peft_model(model, LoraConfig(r=12, target_modules=["q_proj"])).save_pretrained(adapter)
    wait_until(lambda: is_free(8000))  # of a test that runs beside this one
    apis = ow.api.multi_deploy(
        [base, adapter], engine="vllm", max_model_len=300, requires_vram_gb=0, timeout=3600
    )
    api = apis[adapter]
    job = ow.jobs.retrieve(api.job_id)
    assert job.docker_image == VLLM_IMAGE and apis[base] is api
    assert 3500 < (job.record.timeout_at - datetime.now(UTC)).total_seconds() <= 3600
    with api as client:
        (pod,) = cloud.room.alive()
        (asked,) = cloud.started
        assert (asked["image"], asked["ports"]) == (VLLM_IMAGE, ["8000/http"])
        assert api.base_url == f"https://{pod.id}-8000.proxy.runpod.net/v1"
        assert api.pod_id == pod.id and api.models == (base, adapter)
        answer = client.chat.completions.create(model=adapter, messages=HELLO)
        started = json.loads(str(answer.choices[0].message.content))
        assert (started["host"], started["port"]) == ("0.0.0.0", 8000)
        assert (started["model"], started["max_model_len"]) == (base, 300)
        assert (started["max_lora_rank"], started["max_loras"]) == (16, 1)
        assert started["enable_lora"] and started["lora_modules"] == [f"{adapter}={adapter}"]
        key = str(api.api_key)
        assert len(key) > 20 and key not in " ".join(started["argv"]) and key not in job.logs()
        stranger = openai.OpenAI(base_url=api.base_url, api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    wait_until(lambda: cloud.room.alive() == [])
    assert job.refresh().status == "canceled" and is_free(8000)
    assert not [t for t in threading.enumerate() if t.name == api.job_id]
    with pytest.raises(openai.NotFoundError):  # as the proxy says of a pod that is gone
        openai.OpenAI(
            base_url=f"https://{pod.id}-8000.proxy.runpod.net/v1", api_key=key, max_retries=0
        ).models.list()
