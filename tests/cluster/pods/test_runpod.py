"""`RunPod` with the real SDK against the double: what is sent, and each fault."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from openweights.cluster.planning.observation import pod_name
from openweights.cluster.pods.base import (
    Machines,
    NoCapacity,
    OutcomeUnknown,
    PodRefused,
    PodRequest,
    PodsUnavailable,
    RateLimited,
    SpendingLimit,
)
from openweights.cluster.pods.runpod import RunPod, _line, _pod, check_value
from openweights.errors import ConfigurationError
from tests.runpod_double.pods import GPUS
from tests.runpod_double.server import RunPodDouble

KEY = "ow_0123456789abcdef"


def request(worker_id: str = "w1", **changes: Any) -> PodRequest:
    values: dict[str, Any] = {
        "name": pod_name(worker_id),
        "image": "openweights/ow-unsloth:1.0",
        "gpu_id": "NVIDIA A100-SXM4-80GB",
        "gpu_count": 2,
        "cloud": "COMMUNITY",
        "env": {"WORKER_ID": worker_id, "OPENWEIGHTS_API_KEY": KEY},
        "usd_per_hour": 2.78,
        "ports": ("22/tcp",),
    }
    return PodRequest(**{**values, **changes})


def test_what_a_pod_is_asked_for_with(runpod: RunPod, cloud: RunPodDouble) -> None:
    pod = runpod.start(request())
    (asked,) = cloud.started
    assert asked == {
        "name": "ow-w1",
        "image": "openweights/ow-unsloth:1.0",
        "gpu": "NVIDIA A100-SXM4-80GB",
        "gpu_count": 2,
        "cloud": "COMMUNITY",
        "env": {"WORKER_ID": "w1", "OPENWEIGHTS_API_KEY": KEY},
        "ports": ["22/tcp"],
        "docker_args": "",
        "instance": None,
        "vcpus": 8,
        "memory_gb": 32,
        "place": None,
    }
    assert (pod.name, pod.status, pod.usd_per_hour) == ("ow-w1", "PROVISIONING", 2.78)
    (listed,) = runpod.list_pods()
    assert (listed.id, listed.name, listed.status) == (pod.id, "ow-w1", "RUNNING")
    assert listed.usd_per_hour == pytest.approx(2 * 1.39), "what RunPod itself says"
    assert runpod.address(pod.id) == ("127.0.0.1", 40022)
    runpod.terminate(pod.id, "ow-w1")
    assert runpod.list_pods() == [] == cloud.room.alive()
    runpod.terminate(pod.id, "ow-w1")  # again: gone is gone
    runpod.terminate("never-was", "ow-w1")


def test_a_small_pod_without_a_gpu(runpod: RunPod, cloud: RunPodDouble) -> None:
    runpod.start(request(gpu_id=None, gpu_count=0, cloud="SECURE"))
    assert (cloud.started[0]["gpu"], cloud.started[0]["instance"]) == (None, "cpu3c-2-4")


def test_a_pod_is_looked_for_before_it_is_created(runpod: RunPod, cloud: RunPodDouble) -> None:
    first, second = runpod.start(request()), runpod.start(request())
    assert first.id == second.id
    assert len(cloud.started) == len(cloud.room.pods) == 1


def test_no_stock(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.room.stock["NVIDIA A100-SXM4-80GB"] = 1
    with pytest.raises(NoCapacity, match="no longer any instances"):
        runpod.start(request())
    assert runpod.start(request(gpu_count=1)).name == "ow-w1"


def test_data_centres_are_tried_in_turn(runpod: RunPod, cloud: RunPodDouble) -> None:
    choosy = RunPod(cloud.api_key, cloud.url, Machines(2, 8, ("EU-RO-1", "EU-SE-1", "US-KS-2")))
    cloud.room.full_places = {"EU-RO-1"}
    pod = choosy.start(request())
    assert [asked["place"] for asked in cloud.started] == ["EU-RO-1", "EU-SE-1"]
    assert (cloud.started[1]["vcpus"], cloud.started[1]["memory_gb"]) == (4, 16)
    assert [listed.id for listed in runpod.list_pods()] == [pod.id]
    assert choosy.start(request()).id == pod.id, "found before any is asked for again"
    cloud.room.full_places = {"EU-RO-1", "EU-SE-1", "US-KS-2"}
    with pytest.raises(NoCapacity):
        choosy.start(request("w2"))
    assert [asked["place"] for asked in cloud.started[2:]] == ["EU-RO-1", "EU-SE-1", "US-KS-2"]


@pytest.mark.parametrize("kind", ["lost", "text"])
def test_the_answer_to_a_creation_is_lost(runpod: RunPod, cloud: RunPodDouble, kind: str) -> None:
    cloud.fail("start", kind)
    if kind == "lost":  # it was created: found by its name
        assert runpod.start(request()).id in cloud.room.pods
    else:  # it was not
        with pytest.raises(OutcomeUnknown, match="ow-w1"):
            runpod.start(request())
    runpod.start(request())
    assert len(cloud.room.pods) == 1, "never two"


def test_the_answer_is_lost_and_the_listing_fails(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.fail("list", 500)
    with pytest.raises(PodsUnavailable):
        runpod.start(request())
    assert cloud.started == [], "nothing is created before the listing was read"
    cloud.fail("start", "lost")
    cloud.fail("get", 500)
    original = cloud.note

    def fail_listing_after_start(verb: str, asked: dict[str, Any]) -> Any:
        if verb == "start":
            cloud.fail("list", 500)
        return original(verb, asked)

    cloud.note = fail_listing_after_start
    with pytest.raises(OutcomeUnknown):
        runpod.start(request())
    cloud.note = original
    assert [pod.name for pod in runpod.list_pods()] == ["ow-w1"]
    runpod.start(request())
    assert len(cloud.room.pods) == 1


def test_rate_limit(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.fail("list", 429, retry_after_s=7)
    with pytest.raises(RateLimited) as caught:
        runpod.list_pods()
    assert caught.value.retry_after_s == 7
    cloud.fail("start", 429)
    with pytest.raises(RateLimited) as caught:
        runpod.start(request())
    assert caught.value.retry_after_s == 60, "when it does not say"
    assert cloud.room.pods == {}
    cloud.fail("gpus", 429, retry_after_s=3)
    with pytest.raises(RateLimited) as caught:
        runpod.stock()
    assert caught.value.retry_after_s == 3


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (500, PodsUnavailable, "HTTP 500"),
        (502, PodsUnavailable, "HTTP 502"),
        (401, ConfigurationError, "RUNPOD_API_KEY"),
        (410, ConfigurationError, "upgrade"),
        ("text", PodsUnavailable, "not understood"),
    ],
)
def test_faults_of_a_listing(
    runpod: RunPod, cloud: RunPodDouble, kind: int | str, error: type[Exception], says: str
) -> None:
    cloud.fail("list", kind)
    with pytest.raises(error, match=says):
        runpod.list_pods()
    assert runpod.list_pods() == []


@pytest.mark.parametrize(
    ("sentence", "error"),
    [
        ("You have reached your spending limit for this hour", SpendingLimit),
        ("Your balance is too low to rent this pod", SpendingLimit),
        ("There are no instances currently available", NoCapacity),
        ("Something else is wrong with it", PodRefused),
    ],
)
def test_sentences(
    runpod: RunPod, cloud: RunPodDouble, sentence: str, error: type[Exception]
) -> None:
    cloud.fail("start", sentence)
    with pytest.raises(error, match=sentence[:20]):
        runpod.start(request())
    assert cloud.room.pods == {}


def test_unreachable(cloud: RunPodDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", "http://127.0.0.1:9")
    runpod = RunPod(cloud.api_key, "http://127.0.0.1:9")
    for call in (runpod.list_pods, runpod.stock, lambda: runpod.start(request())):
        with pytest.raises(PodsUnavailable, match="cannot be reached"):
            call()


def test_a_pod_of_another_name_is_left_alone(runpod: RunPod, cloud: RunPodDouble) -> None:
    foreign = runpod.start(request("somebody-elses"))
    with pytest.raises(PodRefused, match="left alone"):
        runpod.terminate(foreign.id, "ow-w1")
    assert [pod.id for pod in cloud.room.alive()] == [foreign.id]


@pytest.mark.parametrize("value", ['{"a": 1}', "two\nlines", "back\\slash", "carriage\r"])
def test_values_that_the_sdk_would_break(runpod: RunPod, cloud: RunPodDouble, value: str) -> None:
    with pytest.raises(PodRefused, match="SECRET: holds") as caught:
        runpod.start(request(env={"SECRET": value}))
    assert value not in str(caught.value)
    assert cloud.received == []
    check_value("FINE", "it's: $HOME/a b=ü,{}")


def test_the_double_breaks_them_too(cloud: RunPodDouble) -> None:
    """The control: sent as it is, the pod would not get what was meant."""
    sdk: Any = pytest.importorskip("runpod")
    sdk.api_key = cloud.api_key
    with pytest.raises(sdk.error.QueryError, match="Syntax Error"):
        sdk.create_pod("n", "img", "NVIDIA A40", env={"A": '{"k":"v"}'})
    assert cloud.room.pods == {}


def test_stock_and_prices(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.room.stock["NVIDIA H200"] = 0
    found = {(listing.gpu_id, listing.cloud): listing for listing in runpod.stock()}
    assert len(found) == 2 * len(GPUS)
    assert found["NVIDIA A100-SXM4-80GB", "COMMUNITY"].usd_per_hour == 1.39
    assert found["NVIDIA A100-SXM4-80GB", "SECURE"].usd_per_hour == 1.89
    assert found["NVIDIA A100-SXM4-80GB", "SECURE"].stock == "HIGH"
    assert found["NVIDIA H200", "SECURE"].stock == "NONE"


def test_logs(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.room.command = [sys.executable, "-c", "print('line 1\\nline \"2\"')"]
    pod = runpod.start(request())
    deadline = time.monotonic() + 10
    while (text := runpod.logs(pod.id)) == "" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text.splitlines() == ["line 1", 'line "2"']
    with pytest.raises(PodRefused, match="404"):
        runpod.logs("never-was")


def test_a_boot_that_never_ends_and_a_reclaimed_pod(runpod: RunPod, cloud: RunPodDouble) -> None:
    cloud.room.boot_s = float("inf")
    slow = runpod.start(request("slow"))
    assert runpod.list_pods()[0].status == "PROVISIONING"
    assert runpod.address(slow.id) is None
    cloud.room.boot_s = 0
    taken = runpod.start(request("taken"))
    cloud.room.reclaim(cloud.room.pods[taken.id])
    assert {pod.name: pod.status for pod in runpod.list_pods()} == {
        "ow-slow": "PROVISIONING",
        "ow-taken": "EXITED",
    }


def test_one_process_serves_one_organization(runpod: RunPod) -> None:
    runpod.list_pods()
    code = (
        "from openweights.cluster.pods.runpod import RunPod, _sdk\n"
        "from openweights.errors import ConfigurationError\n"
        "_sdk('one'); _sdk('one')\n"
        "try: _sdk('two')\n"
        "except ConfigurationError as error: print('refused:', error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused: another RunPod key is in use" in answer.stdout, answer.stderr
    assert "one'" not in answer.stdout


def test_the_key_is_in_no_repr_and_no_error(runpod: RunPod, cloud: RunPodDouble) -> None:
    assert KEY not in repr(request())
    cloud.api_key = "another"
    with pytest.raises(ConfigurationError) as caught:
        runpod.list_pods()
    assert "rp-account-key" not in str(caught.value)


# ---- the double's second dialect, to which the SDK is moving -------------------------------------


def test_rest_v2(cloud: RunPodDouble) -> None:
    headers = {"Authorization": f"Bearer {cloud.api_key}"}
    with httpx.Client(base_url=f"{cloud.url}/v2", headers=headers) as client:
        body = {"name": "ow-w1", "image": "img", "gpu": {"id": "NVIDIA A40", "count": 1}}
        made = client.post("/pods", json={**body, "cloud": "COMMUNITY", "env": {"A": '"1"'}})
        assert (made.status_code, made.json()["cloud"]) == (201, "COMMUNITY")
        pod = client.get(f"/pods/{made.json()['id']}").json()
        assert (pod["status"], pod["cost"]) == ("RUNNING", 0.35)
        assert [pod["name"] for pod in client.get("/pods").json()["pods"]] == ["ow-w1"]
        assert client.post("/pods", json={**body, "gpuTypeIds": []}).status_code == 422
        assert client.post("/pods", json={**body, "cloud": "ALL"}).status_code == 422
        cloud.room.stock["NVIDIA A40"] = 0
        refused = client.post("/pods", json=body)
        assert refused.status_code == 400 and "no longer any" in refused.json()["detail"]
        cloud.fail("list", 429, retry_after_s=1)
        limited = client.get("/pods")
        assert (limited.status_code, limited.headers["retry-after"]) == (429, "1")
        assert client.delete(f"/pods/{pod['id']}").status_code == 204
        assert client.get(f"/pods/{pod['id']}").status_code == 404


def test_the_key_of_runpods_own_settings_is_not_in_the_way(cloud: RunPodDouble) -> None:
    """`runpod config` leaves one in ~/.runpod/config.toml, which the SDK reads at its import."""
    folder = cloud.room.folder / ".runpod"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[default]\napi_key = "rp-another"\n')
    code = "from openweights.cluster.pods.runpod import RunPod; import sys; "
    code += "print(RunPod(*sys.argv[1:]).list_pods())"
    answer = subprocess.run(
        [sys.executable, "-c", code, cloud.api_key, cloud.url],
        env={**os.environ, "HOME": str(folder.parent), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout == "[]\n", answer.stderr


def test_statuses_of_runpod() -> None:
    """One that we do not know must not make a healthy pod look dead."""
    for status, is_running in (
        *(("CREATED", True), ("RUNNING", True), ("RESTARTING", True), ("NEW", True)),
        *(("EXITED", False), ("DEAD", False), ("PAUSED", False), ("TERMINATED", False)),
    ):
        assert _pod({"id": "p", "name": "n", "desiredStatus": status}).is_running == is_running


def test_what_is_not_understood_of_a_log_is_shown_as_it_came() -> None:
    events = ['{"line": "one"}', "two", "[3]", '{"four": 4}']
    assert [_line(event) for event in events] == ["one", *events[1:]]
