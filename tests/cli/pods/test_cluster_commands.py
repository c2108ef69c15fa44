"""`ow cluster`, `ow manage`, `ow deploy`, `ow ssh` and `ow costs`, with both doubles."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights import OpenWeights
from openweights.cli.pods.cluster import describe
from openweights.cluster.planning.actions import ReportJobs
from tests.cli.conftest import Ow, process_env
from tests.runpod_double.server import RunPodDouble
from tests.supabase_double.team import Team
from tests.waiting import HANGS_S, wait_until

TRAIN = Path(__file__).parents[3] / "cookbook" / "sdft" / "data" / "train.jsonl"
# Notes its arguments, and runs the remote command here; the login fails on demand.
SSH = """#!/bin/sh
printf '%s\\n' "$*" >> "$SSH_LOG"
test -z "$SSH_FAILS" || { echo 'Permission denied (publickey).' >&2; exit 255; }
for last; do :; done
cd "$SSH_ROOT" && exec sh -c "$(printf '%s' "$last" | sed "s#/workspace#$SSH_ROOT/workspace#g")"
"""


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPodDouble]:
    with RunPodDouble(tmp_path / "pods", command=["sleep", "60"]) as cloud:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", cloud.url)
        monkeypatch.setenv("RUNPOD_API_KEY", cloud.api_key)
        yield cloud


@pytest.fixture
def organization(team: Team, home: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """The environment of an admin of it."""
    settings = team.settings(home)
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", team.admin_key)
    monkeypatch.setenv("SUPABASE_URL", team.url)
    monkeypatch.setenv("SUPABASE_ANON_KEY", settings.supabase_anon_key or "")
    return team


# ---- ow cluster ----------------------------------------------------------------------------------


def test_dry_run(ow: Ow, organization: Team, cloud: RunPodDouble) -> None:
    job = OpenWeights().exec.create(command="true", requires_vram_gb=24, cloud_type="ALL")
    result = ow("cluster", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"for {job.id}: the first of 1x " in result.stdout
    assert " COMMUNITY $" in result.stdout and " SECURE $" in result.stdout
    rows = "select id from workers where organization_id = %s"
    assert cloud.started == []
    assert organization.execute(rows, organization.organization_id) == []
    impossible = ReportJobs(("a", "b"), "no GPU is that large", can_wait=False)
    assert describe(impossible) == "nothing for a, b: no GPU is that large"


def test_dry_run_for_a_file_of_jobs_needs_no_keys(
    ow: Ow, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"model": "org/tiny-4B", "training_file": str(TRAIN), "loss": "sft", "max_steps": 100}
        | {"requires_vram_gb": 40, "cloud_type": "ALL"},
        {"kind": "exec", "command": "true", "requires_vram_gb": 10**4},
    ]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    result = ow("cluster", "--dry-run", "--jobs", str(file))
    assert result.exit_code == 0, result.output
    first, second, start, report = result.stdout.splitlines()
    assert re.fullmatch(
        r"line 1  org/tiny-4B  100 steps · 40 GB of GPU memory · \$0\.\d\d an hour on 1x \w+ \w+",
        first,
    )
    assert second == "line 3  custom  10000 GB"
    assert start.startswith(
        "start a worker of openweights/ow-unsloth:1.0 for line 1: the first of 1x "
    )
    assert report.startswith("nothing for line 3: needs 10000 GiB of GPU memory")
    assert "no registry has openweights/ow-unsloth:1.0: build it" in result.stderr
    assert "OPENWEIGHTS_IMAGE" in result.stderr and "docs/runpod.md" in result.stderr
    monkeypatch.setenv("OPENWEIGHTS_IMAGE", "docker.io/we/ow-unsloth:1.0")
    own = ow("cluster", "--dry-run", "--jobs", str(file))
    assert "start a worker of docker.io/we/ow-unsloth:1.0" in own.stdout and own.stderr == ""
    assert not home.exists() or not list(home.glob("openweights.db")), "no store was touched"
    file.write_text(json.dumps({**rows[0], "learning_rat": 1}))
    wrong = ow("cluster", "--dry-run", "--jobs", str(file))
    assert wrong.exit_code == 1 and wrong.stderr.startswith(f"ow: {file}:1: learning_rat: is not a")
    file.write_text("[1]\n")
    assert (
        "no object; write what create takes"
        in ow("cluster", "--dry-run", "--jobs", str(file)).stderr
    )
    file.write_text('{"kind": "nothing"}')
    assert (
        "kind: 'nothing' is none of api," in ow("cluster", "--dry-run", "--jobs", str(file)).stderr
    )
    assert ow("cluster", "--jobs", str(file)).exit_code == 2


def test_cluster_runs_until_it_is_told_to_end(
    organization: Team, cloud: RunPodDouble, tmp_path: Path
) -> None:
    OpenWeights().exec.create(command="true", requires_vram_gb=0)
    command = [sys.executable, "-m", "openweights.cli", "cluster"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=process_env(), stderr=log)
    try:

        def has_started() -> bool:
            assert process.poll() is None
            return bool(cloud.started)

        wait_until(has_started)
        second = subprocess.run(command, env=process_env(), capture_output=True, text=True)
        assert second.returncode == 1 and "already runs the manager" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANGS_S) == 0
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "log").read_text()
    assert "started 1x " in text and "HTTP Request" not in text and "ow_" not in text
    assert len(cloud.room.alive()) == 1, "pods go on"


def test_cluster_says_what_is_missing(ow: Ow, organization: Team) -> None:
    result = ow("cluster", "--dry-run")
    assert result.exit_code == 1 and "RUNPOD_API_KEY is not set" in result.stderr
    assert "Without keys, `ow cluster --dry-run --jobs FILE` says what pods" in result.stderr
    assert ow("cluster", "--all", "--dry-run").exit_code == 2


def test_cluster_needs_a_project(ow: Ow, cloud: RunPodDouble) -> None:
    result = ow("cluster")
    assert result.exit_code == 1 and "SUPABASE_URL" in result.stderr


# ---- ow manage -----------------------------------------------------------------------------------


def test_manage(ow: Ow, tmp_path: Path, home: Path) -> None:
    file = tmp_path / "lab.env"
    file.write_text("SUPABASE_URL=u\nSUPABASE_ANON_KEY=a\nOPENWEIGHTS_API_KEY=ow_1\n")
    result = ow("manage", "start", "lab", "--env-file", str(file))
    assert result.exit_code == 1 and "lab: RUNPOD_API_KEY must be set" in result.stderr
    file.write_text(file.read_text() + "RUNPOD_API_KEY=rp-secret\n")
    started = ow("manage", "start", "lab", "--env-file", str(file))
    assert started.exit_code == 0 and "rp-secret" not in started.output
    assert (home / "managed" / "lab.env").stat().st_mode & 0o077 == 0
    assert ow("manage", "ls").stdout == "lab\n"
    assert ow("manage", "stop", "lab").exit_code == 0
    assert ow("manage", "ls").stdout == ""
    assert ow("manage", "stop", "lab").exit_code == 1


# ---- ow deploy -----------------------------------------------------------------------------------


def test_deploy(
    ow: Ow, organization: Team, cloud: RunPodDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_WORKERS", "3")
    monkeypatch.setenv("OPENWEIGHTS_POD_ENV", "HF_ORG")
    monkeypatch.setenv("HF_ORG", "lab")
    result = ow("deploy")
    assert result.exit_code == 0, result.output
    (asked,) = cloud.started
    env = asked["env"]
    assert (asked["gpu"], asked["instance"]) == (None, "cpu3c-2-4")
    assert asked["name"] == f"owmanager-{organization.organization_id}"
    assert env["OPENWEIGHTS_RUNPOD_API_KEY"] == cloud.api_key
    assert (env["MAX_WORKERS"], env["HF_ORG"], env["OPENWEIGHTS_POD_ENV"]) == ("3", "lab", "HF_ORG")
    assert env["OPENWEIGHTS_API_KEY"] not in (organization.admin_key, "")
    assert env["OPENWEIGHTS_API_KEY"] not in result.output
    again = ow("deploy")
    assert again.exit_code == 0 and "runs already" in again.stderr and len(cloud.started) == 1
    assert ow("deploy", "--stop").exit_code == 0
    assert cloud.room.alive() == []
    key = (
        "select revoked_at is not null from api_keys "
        "where name = 'ow deploy' and organization_id = %s"
    )
    assert organization.execute(key, organization.organization_id) == [(True,)]
    assert ow("deploy", "--stop").exit_code == 1


# ---- ow ssh --------------------------------------------------------------------------------------


def test_a_deployment_that_fails_leaves_no_key(
    ow: Ow, organization: Team, cloud: RunPodDouble
) -> None:
    cloud.fail("start", "Your balance is too low")
    assert ow("deploy").exit_code == 1
    keys = "select revoked_at from api_keys where name = 'ow deploy' and organization_id = %s"
    ((revoked_at,),) = organization.execute(keys, organization.organization_id)
    assert revoked_at is not None and cloud.room.alive() == []
    assert ow("deploy").exit_code == 0
    (pod,) = cloud.room.alive()
    cloud.room.terminate(pod, status="EXITED")
    assert ow("deploy").exit_code == 0
    (other,) = cloud.room.alive()
    assert other.id != pod.id, "one that has ended is no manager that runs"


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key, and an `ssh` of ours."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("SSH_ROOT", str(tmp_path / "pod"))
    (tmp_path / "pod").mkdir()
    key = tmp_path / "id"
    key.write_text("PRIVATE")
    key.with_name("id.pub").write_text("ssh-ed25519 AAAA me@here\n")
    return key


def test_ssh_runs_a_command_in_a_pod_that_is_ended(
    ow: Ow, cloud: RunPodDouble, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a b.py").write_text("print(1)")
    (folder / ".env").write_text("SECRET=1")
    monkeypatch.chdir(folder)
    line = "ls -A > seen; exit 3"
    result = ow("ssh", "--key-path", str(key), "--gpu", "A40", "--count", "2", "--sync", line)
    assert result.exit_code == 3, result.output
    assert (tmp_path / "pod/workspace/seen").read_text().split("\n") == ["a b.py", "seen", ""]
    (asked,) = cloud.started
    assert (asked["gpu"], asked["gpu_count"], asked["cloud"]) == ("NVIDIA A40", 2, "SECURE")
    assert asked["env"] == {"PUBLIC_KEY": "ssh-ed25519 AAAA me@here"}
    assert asked["ports"] == ["22/tcp"] and asked["name"].startswith("owdev-")
    assert cloud.room.alive() == [] and f"ended {asked['name']}" in result.stderr
    log = (tmp_path / "ssh.log").read_text()
    assert f"-i {key} -p 40022" in log and "root@127.0.0.1" in log


def test_ssh_keeps_a_pod_only_when_told(ow: Ow, cloud: RunPodDouble, key: Path) -> None:
    result = ow("ssh", "--key-path", str(key), "--gpu", "A40", "--keep", "echo", "it's me")
    (pod,) = cloud.room.alive()
    assert result.exit_code == 0 and f"`ow ssh --end {pod.name}` ends it" in result.stderr
    assert ow("ssh", "--ls").stdout == f"{pod.name}  RUNNING  $0.44/h\n"
    worker = cloud.room.create(
        {"name": "ow-worker-1", "image": "", "cloud": "SECURE", "env": {}, "ports": []}
    )
    refused = ow("ssh", "--end", worker.name)
    assert refused.exit_code == 1 and "is no development pod" in refused.stderr
    assert ow("ssh", "--end", pod.name).exit_code == 0
    assert cloud.room.alive() == [worker]
    again = ow("ssh", "--end", pod.name)
    assert again.exit_code == 1 and f"there is no pod {pod.name}" in again.stderr


@pytest.mark.parametrize("slip", [["--gpus", "A40"], ["--snyc", "true"], ["ls -l", "--kep"]])
def test_ssh_starts_no_pod_for_a_slip(
    ow: Ow, cloud: RunPodDouble, key: Path, slip: list[str]
) -> None:
    result = ow("ssh", "--key-path", str(key), *slip)
    assert result.exit_code == 2 and "No such option" in result.stderr
    assert cloud.started == []


def test_ssh_ends_the_pod_after_an_error_or_says_that_it_could_not(
    ow: Ow, cloud: RunPodDouble, key: Path
) -> None:
    cloud.fail("start", "lost")
    cloud.fail("get", 401)
    result = ow("ssh", "--key-path", str(key), "--gpu", "A40", "true")
    assert result.exit_code == 1 and "RUNPOD_API_KEY" in result.stderr
    assert cloud.room.alive() == []
    cloud.fail("terminate", 500, times=3)
    result = ow("ssh", "--key-path", str(key), "--gpu", "A40", "true")
    (pod,) = cloud.room.alive()
    assert result.exit_code == 1
    assert f"POD {pod.name} MAY STILL RUN, AND COST" in result.stderr


def test_ssh_without_stock_or_key(ow: Ow, cloud: RunPodDouble, key: Path, tmp_path: Path) -> None:
    cloud.room.stock["NVIDIA A40"] = 0
    result = ow("ssh", "--key-path", str(key), "--gpu", "A40", "true")
    assert result.exit_code == 1 and "no longer any instances" in result.stderr
    assert "MAY STILL RUN" not in result.stderr and cloud.room.alive() == []
    result = ow("ssh", "--key-path", str(tmp_path / "none"), "true")
    assert result.exit_code == 1 and "ssh-keygen -t ed25519" in result.stderr
    result = ow("ssh", "--key-path", str(key), "--gpu", "TPU", "true")
    assert result.exit_code == 1 and "TPU" in result.stderr


# ---- ow costs ------------------------------------------------------------------------------------


def test_costs(ow: Ow, organization: Team) -> None:
    organization.execute(
        "insert into workers (organization_id, id, status, provider, pod_id, price_usd_per_hour, "
        "started_at, ended_at) values (%s, 'w1', 'terminated', 'runpod', 'p1', 2, "
        "now() - interval '3 hours', now() - interval '1 hour')",
        organization.organization_id,
    )
    result = ow("costs")
    assert result.exit_code == 0, result.output
    assert result.stdout == "$4.00 in all: $0.00 for jobs, $4.00 overhead\n"
    workers = ow("costs", "--by", "worker").stdout.splitlines()
    assert workers[1].split() == ["WORKER", "PROVIDER", "USD/H", "POD", "USD"]
    assert workers[2].split() == ["w1", "runpod", "2.00", "ended", "4.00"]
    assert "admin@lab.example" in ow("costs", "--by", "key").stdout
    assert '"total_usd": 4.0' in ow("costs", "--json").stdout
