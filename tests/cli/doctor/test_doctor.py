"""`ow doctor` and `ow worker`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from openweights.backends.base import Backend
from tests.cli.conftest import Ow, process_env, submit


def test_doctor_finds_a_working_installation(ow: Ow, backend: Backend) -> None:
    submit(backend, "ftjob-waiting")
    answer = ow("doctor", "--json")
    report = json.loads(answer.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert answer.exit_code == 0 and report["ok"] is True, answer.stdout
    assert checks["python"]["detail"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert "click" in checks["base packages"]["detail"]
    assert {"extra train", "extra plot", "gpu", "home", "disk", "store"} <= set(checks)
    assert checks["jobs"]["detail"] == "1 pending, 0 in progress"
    for check in report["checks"]:
        # What is missing comes with the command that gets it.
        if check["name"].startswith("extra ") and check["status"] == "missing":
            assert f"{sys.executable} -m pip install " in check["remedy"]
    assert "FAIL" not in ow("doctor").stdout


def test_doctor_does_not_make_the_home_by_looking_for_it(ow: Ow, home: Path) -> None:
    details = [check["detail"] for check in json.loads(ow("doctor", "--json").stdout)["checks"]]
    assert f"{home} (not made yet)" in details


def test_doctor_fails_when_something_needed_is_broken(ow: Ow, home: Path) -> None:
    home.write_text("a file where the folder should be")
    answer = ow("doctor", "--json")
    report = json.loads(answer.stdout)
    broken = {check["name"] for check in report["checks"] if check["status"] == "broken"}
    assert answer.exit_code == 1 and report["ok"] is False
    assert broken == {"home", "store"}


def test_worker_ends_when_told(ow: Ow, backend: Backend) -> None:
    submit(backend, "myjob-quick", type="custom", script="echo done here")
    assert subprocess.run(worker_command("--once"), env=process_env(), timeout=60).returncode == 0
    assert backend.get_job("myjob-quick").status == "completed"
    assert "done here" in ow("logs", "myjob").stdout

    with subprocess.Popen(worker_command(), env=process_env(), stderr=subprocess.PIPE) as process:
        while not backend.list_workers(statuses=("active",)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def worker_command(*arguments: str) -> list[str]:
    """`ow worker` in a process of its own."""
    return [sys.executable, "-m", "openweights.cli", "worker", *arguments]
