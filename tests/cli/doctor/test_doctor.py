"""`ow doctor` and `ow worker`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from openweights.backends.base import Backend
from openweights.cli.doctor import is_apart, training_verdict
from openweights.cli.doctor.project import Check
from tests.cli.conftest import Ow, process_env, submit
from tests.waiting import HANGS_S


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
    shown = ow("doctor").stdout
    assert "FAIL" not in shown
    last = shown.splitlines()[-1]
    assert last == report["verdict"]
    assert last.startswith("training works here, on the ") and "; the Hugging Face hub " in last
    # What is not needed stands behind all else.
    head, mark, apart = shown.partition("not installed, and not needed")
    absent = [c["name"] for c in report["checks"] if c["status"] == "missing"]
    for name in absent:
        is_extra = name.startswith("extra ") and name not in ("extra train", "extra plot")
        is_extra = is_extra and (name != "extra gpu" or checks["gpu"]["status"] != "ok")
        assert name in (apart if is_extra else head)


def test_what_a_gpu_trains_with_is_asked_for_where_there_is_one() -> None:
    gpu = Check("extra gpu", "missing", "bitsandbytes is not installed")
    unsloth = Check("extra unsloth", "missing", "unsloth is not installed")
    vllm = Check("extra vllm", "missing", "vllm is not installed")
    gpus = {status: [Check("gpu", status, "")] for status in ("ok", "missing")}
    assert is_apart(gpu, gpus["missing"]) and not is_apart(gpu, gpus["ok"])
    assert is_apart(unsloth, gpus["ok"]) and is_apart(vllm, gpus["ok"])


def test_doctor_says_why_training_does_not_work() -> None:
    absent = Check("extra train", "missing", "torch is not installed")
    other = Check("extra train", "missing", "trl is 1.0, tested with 1.14.2")
    broken = Check("home", "broken", "it is a file")
    assert training_verdict([absent]) == "training does not work here: torch is not installed"
    assert training_verdict([other]).startswith("training may not work here: trl is 1.0")
    assert training_verdict([absent, broken]) == "training does not work here: home"
    assert training_verdict([Check("gpu", "ok", "H200")]) == "training works here, on the GPU"


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
    assert (
        subprocess.run(worker_command("--once"), env=process_env(), timeout=HANGS_S).returncode == 0
    )
    assert backend.get_job("myjob-quick").status == "completed"
    assert "done here" in ow("logs", "myjob").stdout

    with subprocess.Popen(worker_command(), env=process_env(), stderr=subprocess.PIPE) as process:
        while not backend.list_workers(statuses=("active",)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANGS_S) == 0


def worker_command(*arguments: str) -> list[str]:
    """`ow worker` in a process of its own."""
    return [sys.executable, "-m", "openweights.cli", "worker", *arguments]
