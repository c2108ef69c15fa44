"""`ow exec` against a real worker that starts by itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.cli.jobs.exec import shell_code
from tests.cli.conftest import Ow, process_env
from tests.waiting import HANGS_S

Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a script, and things that must not travel."""
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "say.py").write_text(
        "import os, sys\n"
        "print('files', sorted(f'{d}/{n}' for d, _, ns in os.walk('.') for n in ns\n"
        "      if 'openweights' not in d and '.spool' not in d))\n"
        "print('arguments', sys.argv[1:])\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    (folder / ".gitignore").write_text("*.ckpt\n")
    (folder / "big.ckpt").write_text("x")
    (folder / ".env").write_text("SECRET=1")
    return folder


def test_wait_prints_the_log_and_exits_with_the_jobs_code(
    ow_process: Process, project: Path
) -> None:
    good = ow_process("exec", "--wait", "python", "src/say.py", "0", "--json", cwd=project)
    assert good.returncode == 0, good.stderr
    assert "arguments ['0', '--json']" in good.stdout
    assert "./src/say.py" in good.stdout
    assert "big.ckpt" not in good.stdout and ".env'" not in good.stdout
    assert good.stderr.startswith("ow: job execjob-")

    again = ow_process("exec", "--wait", "python", "src/say.py", "0", "--json", cwd=project)
    assert (again.returncode, again.stdout) == (0, good.stdout)
    assert "has run before" in again.stderr

    # A quoted line may be followed by our options.
    bad = ow_process("exec", "python src/say.py 3 | cat; exit 3", "--wait", cwd=project)
    assert bad.returncode == 3, bad.stderr
    assert "arguments ['3']" in bad.stdout
    assert "failed: exit code 3" in bad.stderr


def test_without_waiting_it_prints_the_id(
    ow: Ow, project: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    shown = ow(
        "exec",
        "--cloud-type",
        "all",
        "--requires-vram-gb",
        "80",
        "--allowed-hardware",
        "2x H100S",
        "--allowed-hardware",
        "h200",
        "--json",
        "sleep",
        "30",
    )
    assert shown.exit_code == 0, shown.output
    job = json.loads(shown.stdout)
    assert job["params"]["cloud_type"] == "ALL"
    assert job["requires_vram_gb"] == 80
    assert job["allowed_hardware"] == ["2x H100S", "1x H200"]
    assert ow("exec", "sleep", "30").stdout == f"{job['id']}\n"
    assert ow("cancel", job["id"]).exit_code == 0


def test_ctrl_c_says_how_to_go_on_and_a_cancel_ends_the_wait(
    ow: Ow, project: Path, backend: Backend
) -> None:
    command = [sys.executable, "-m", "openweights.cli", "exec", "--wait", "echo begun; sleep 9999"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=process_env(),
            cwd=project,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as waiting:
        assert waiting.stdout is not None and waiting.stderr is not None
        wait_for_line(waiting, "begun")
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(timeout=HANGS_S) == 130
        said = waiting.stderr.read()
    (job,) = backend.list_jobs()
    assert f"`ow logs -f {job.id}`" in said and f"`ow cancel {job.id}`" in said
    assert job.status == "in_progress"

    with start() as waiting:
        wait_for_line(waiting, "begun")
        assert ow("cancel", job.id).exit_code == 0
        assert waiting.wait(timeout=HANGS_S) == 1
        assert waiting.stderr is not None
        assert f"job {job.id} canceled" in waiting.stderr.read()


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    """Read the output up to that line."""
    assert process.stdout is not None
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"the output ended without {line!r}")


@pytest.mark.parametrize(
    ("ended", "code"), [(3, 3), (255, 255), (999, 255), (-9, 137), (0, 1), (None, 1)]
)
def test_exit_codes_are_those_of_a_shell(ended: int | None, code: int) -> None:
    assert shell_code(ended) == code
