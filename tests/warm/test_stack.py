"""What is forked from the warm stack starts, is told of signals, and ends, as a process would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import has_ended, wait_until
from tests.warm.stack import WarmStack

SCRIPT = """
import os, sys, time
print(os.getpid(), "torch" in sys.modules, os.environ["OF_THE_JOB"], *sys.argv[1:], flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(7)
"""


def loaded(folder: str) -> None:
    """Leaves whether torch is there before anything is imported, under the rank's number."""
    Path(folder, os.environ["RANK"]).write_text(str("torch" in sys.modules))


def failing() -> None:
    raise ValueError("no such luck")


def test_ranks_find_the_stack_and_their_failure_is_told(stack: WarmStack, tmp_path: Path) -> None:
    stack.run(2, "tests.warm.test_stack:loaded", str(tmp_path))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]
    with pytest.raises(AssertionError, match=r"^\[1\]: (.|\n)*no such luck"):
        stack.run(1, "tests.warm.test_stack:failing")


def start(folder: Path, does: str) -> subprocess.Popen[str]:
    (folder / "job.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "job.py", does],
        cwd=folder,
        env={**os.environ, "OPENWEIGHTS_RUN_ID": "1", "OF_THE_JOB": "given"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def waiting(warm_jobs: None, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A job that waits, and the fork that does it."""
    with start(tmp_path, "wait") as process:
        assert process.stdout is not None
        number, *told = process.stdout.readline().split()
        assert told == ["True", "given", "wait"] and int(number) != process.pid
        yield process, int(number)


@pytest.mark.usefixtures("warm_jobs")
def test_the_exit_status_is_passed_on(tmp_path: Path) -> None:
    process = start(tmp_path, "end")
    output, _ = process.communicate()
    assert process.returncode == 7 and "True given end" in output


@pytest.mark.usefixtures("warm_jobs")
def test_what_a_worker_is_told_on_the_command_line_is_forked_too() -> None:
    command = [sys.executable, "-c", SCRIPT, "end"]
    env = {**os.environ, "OPENWEIGHTS_RUN_ID": "1", "OF_THE_JOB": "given"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 7 and "True given end" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both(
    waiting: tuple[subprocess.Popen[str], int], number: signal.Signals
) -> None:
    process, fork = waiting
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: has_ended(fork))
