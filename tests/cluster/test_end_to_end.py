"""Client -> Supabase double -> manager -> RunPod double -> worker process -> SDFT -> pod gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openweights import OpenWeights
from openweights.client.jobs import Job
from openweights.cluster.launch import open_manager
from openweights.cluster.org_manager import OrganizationManager
from openweights.cluster.planning.limits import Limits
from openweights.settings import ClusterSettings
from tests.runpod_double.server import RunPodDouble
from tests.supabase_double.team import Team
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from tests.warm.stack import WarmStack

LIMITS = Limits(idle_s=1.5, startup_s=60, unresponsive_s=20, missing_pod_s=5, stopping_s=15)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and {i}?"},
            {"role": "assistant", "content": f"That is {2 * i}."},
        ]
    }
    for i in range(4)
]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPodDouble]:
    """RunPod whose pods are workers."""
    with RunPodDouble(tmp_path / "pods") as cloud:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", cloud.url)
        yield cloud


@pytest.fixture
def manager(
    team: Team,
    cloud: RunPodDouble,
    home: Path,
    stack: WarmStack,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[OrganizationManager]:
    team.set_timing(lease_s=10, heartbeat_s=0.5)
    settings = team.settings(home)
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", settings.api_key or "")
    monkeypatch.setenv("SUPABASE_URL", settings.supabase_url or "")
    monkeypatch.setenv("SUPABASE_ANON_KEY", settings.supabase_anon_key or "")
    # In pods of which jobs start warm.
    cluster = ClusterSettings(cloud.api_key, cloud.url, max_workers=3, pod_env=stack.env)
    with open_manager(settings, cluster, limits=LIMITS) as manager:
        yield manager


def run_until(manager: OrganizationManager, condition: Callable[[], object]) -> None:
    """The manager's own loop, until the condition holds."""
    stop = threading.Event()
    thread = threading.Thread(target=manager.run, args=(stop, 0.3))
    thread.start()
    try:
        wait_until(condition)
    finally:
        stop.set()
        thread.join()


def submit_sdft(ow: OpenWeights, folder: Path) -> Job:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ow.fine_tuning.create(
        model=str(make_tiny_model(folder / "tiny")),
        training_file=ow.files.upload(str(data), "conversations")["id"],
        loss="sdft",
        sdft_max_new_tokens=4,
        sdft_gate="off",  # no demonstration helps a random model
        max_steps=2,
        requires_vram_gb=0,
        cloud_type="SECURE",
    )


def test_jobs_of_both_tiers(
    team: Team, cloud: RunPodDouble, manager: OrganizationManager, tmp_path: Path
) -> None:
    ow = OpenWeights()
    sdft = submit_sdft(ow, tmp_path)
    other = ow.exec.create(
        command="env | sort; cat /proc/$PPID/environ", requires_vram_gb=0, cloud_type="COMMUNITY"
    )
    foreign = cloud.room.create(
        {"name": "ow-of-another-team", "image": "", "cloud": "SECURE", "env": {}, "ports": []}
    )
    jobs = (sdft, other)
    run_until(manager, lambda: all(job.refresh().status == "completed" for job in jobs))
    assert len(cloud.started) == 2, "one pod each"
    tiers = {asked["env"]["WORKER_ID"]: asked["cloud"] for asked in cloud.started}
    assert sorted(tiers.values()) == ["COMMUNITY", "SECURE"]
    for job, tier in ((sdft, "SECURE"), (other, "COMMUNITY")):
        (run,) = job.runs
        assert tiers[run.worker_id] == tier
    run_until(manager, lambda: cloud.room.alive() == [foreign] and is_closed(team))
    check_books(team, cloud)
    check_secrets(team, cloud, other.logs())
    assert any(event.data.get("path", "").startswith("adapter") for event in sdft.runs[0].events)


def is_closed(team: Team) -> bool:
    """The manager has seen that the pods are gone, and revoked their keys."""
    mine = "organization_id = %s"
    open_rows = f"select id from workers where {mine} and ended_at is null"
    live_keys = f"select id from api_keys where {mine} and role = 'worker' and revoked_at is null"
    return not any(team.execute(query, team.organization_id) for query in (open_rows, live_keys))


def check_books(team: Team, cloud: RunPodDouble) -> None:
    rows = team.execute(
        "select status, pod_id, provider, price_usd_per_hour, started_at, ended_at from workers "
        "where organization_id = %s",
        team.organization_id,
    )
    assert len(rows) == 2
    for status, pod_id, provider, price, started_at, ended_at in rows:
        assert (status, provider) == ("terminated", "runpod")
        assert float(price) == cloud.room.pods[pod_id].price
        assert started_at < ended_at
    keys = team.execute(
        "select revoked_at from api_keys where role = 'worker' and organization_id = %s",
        team.organization_id,
    )
    assert len(keys) == 2 and all(revoked_at is not None for (revoked_at,) in keys)


def check_secrets(team: Team, cloud: RunPodDouble, log: str) -> None:
    """Neither pods nor logs have what is the manager's alone."""
    for asked in cloud.started:
        env = asked["env"]
        assert "RUNPOD_API_KEY" not in env and team.admin_key not in env.values()
        assert env["OPENWEIGHTS_API_KEY"].startswith("ow_")
        assert env["OPENWEIGHTS_API_KEY"] not in log
        assert asked["name"] == f"ow-{env['WORKER_ID']}"
    assert cloud.api_key not in log and team.admin_key not in log
    assert "OPENWEIGHTS_RUN_ID" in log, "the control: it is the job's environment"


def test_a_reclaimed_pod_is_replaced(
    cloud: RunPodDouble, manager: OrganizationManager, tmp_path: Path
) -> None:
    ow = OpenWeights()
    job = ow.exec.create(
        command=f"test -e {tmp_path}/taken || sleep 9999",
        requires_vram_gb=0,
        cloud_type="COMMUNITY",
    )
    run_until(manager, lambda: job.runs and job.refresh().status == "in_progress")
    (pod,) = cloud.room.alive()
    (tmp_path / "taken").touch()
    cloud.room.reclaim(pod)
    run_until(manager, lambda: job.refresh().status == "completed")
    first, second = job.runs
    assert first.worker_id != second.worker_id
    assert first.error == "its worker was shut down, not counted"
    run_until(manager, lambda: cloud.room.alive() == [])


def test_two_pods_at_most_for_four_groups(
    team: Team, cloud: RunPodDouble, home: Path, manager: OrganizationManager
) -> None:
    cloud.room.command = ["sleep", "9999"]
    ow = OpenWeights()
    for gpu in ("A100", "A100S", "H100S", "H200"):
        ow.exec.create(command=f"echo {gpu}", requires_vram_gb=0, allowed_hardware=f"1x {gpu}")
    cluster = ClusterSettings(cloud.api_key, cloud.url, max_workers=2)
    with open_manager(team.settings(home), cluster) as two:
        for _ in range(3):
            two.step()
    assert len(cloud.room.alive()) == 2
    assert len({asked["gpu"] for asked in cloud.started}) == 2
