"""After a reboot the next command, whichever, has the jobs on this machine go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from openweights.backends.base import Backend
from openweights.backends.local.worker_locks import ASKED_TO_END, WORKER_LOCK
from tests.cli.conftest import process_env, submit
from tests.waiting import HANGS_S, comes_true, wait_until

Process = Callable[..., subprocess.CompletedProcess[str]]


def _all_of(home: Path) -> list[psutil.Process]:
    """Every process of the product with that home, but this one."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OPENWEIGHTS_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def _reboot(home: Path) -> None:
    """Everything is gone at once: nothing that still runs sees that another has ended."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in _all_of(home):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    wait_until(lambda: not _all_of(home))


def _becomes(backend: Backend, status: str, within_s: float = HANGS_S) -> bool:
    return comes_true(lambda: backend.get_job("ftjob-one").status == status, within_s)


@pytest.mark.parametrize("command", [["ls"], ["doctor"], ["gc"]], ids=" ".join)
def test_the_next_command_takes_up_what_was_lost(
    ow_process: Process, backend: Backend, home: Path, command: list[str]
) -> None:
    submit(backend, "ftjob-one", script="test -e $OPENWEIGHTS_HOME/again || sleep 9999")
    worker = [sys.executable, "-m", "openweights.worker.main", "--embedded"]
    process = subprocess.Popen(worker, env=process_env(), start_new_session=True)
    assert _becomes(backend, "in_progress")
    _reboot(home)
    process.wait()
    (home / "again").touch()
    assert not _becomes(backend, "completed", within_s=0.5), (
        "the control: by itself nothing happens"
    )
    answer = ow_process(*command)
    assert answer.stderr == "ow: jobs were waiting without a worker; started one\n"
    assert _becomes(backend, "completed")
    assert [run.status for run in backend.list_runs(job_id="ftjob-one")] == ["failed", "completed"]


def test_a_worker_that_was_asked_to_end_is_not_replaced(
    ow_process: Process, backend: Backend, home: Path
) -> None:
    submit(backend, "ftjob-one")
    assert ow_process("ls").stderr == "", "there was never one"
    (home / WORKER_LOCK).write_text(ASKED_TO_END)
    assert ow_process("ls").stderr == ""
    assert backend.get_job("ftjob-one").status == "pending"
