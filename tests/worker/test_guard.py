"""The guard leaves no process of a job behind, whoever is killed.

A control shows that the check would see one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights.worker.execution import RunControl
from openweights.worker.process import GuardedProcess, kill_strays, marked_processes
from tests.waiting import HANGS_S, NEVER_S, comes_true, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Three generations, two of them in sessions of their own, and none that SIGTERM ends.
STUBBORN = """
trap '' TERM
setsid sh -c 'trap "" TERM; (setsid sleep 9999 &) ; sleep 9999' &
sleep 9999 & sleep 9999 &
touch ready
wait; wait; sleep 9999
"""

# A worker that starts a command, guarded or not, and waits for it.
WORKER = """
import os, subprocess, sys
from pathlib import Path
from openweights.worker.process import GuardedProcess
kind, script, folder, marker = sys.argv[1:]
name, _, value = marker.partition("=")
env = {**os.environ, name: value}
if kind == "guarded":
    process = GuardedProcess(script, folder=Path(folder), env=env, grace_s=5, marker=marker)
    Path(folder, "guard").write_text(str(process._guard.pid))
else:
    process = subprocess.Popen(["sh", "-c", script], cwd=folder, env=env, start_new_session=True)
process.wait()
"""


@pytest.fixture
def marker() -> Iterator[str]:
    marker = f"OPENWEIGHTS_TEST_MARKER={uuid.uuid4().hex}"
    yield marker
    kill_strays(marker)


def start(script: str, folder: Path, marker: str, grace_s: float = 5.0) -> GuardedProcess:
    name, _, value = marker.partition("=")
    env = {**os.environ, name: value}
    return GuardedProcess(script, folder=folder, env=env, grace_s=grace_s, marker=marker)


def output(process: GuardedProcess) -> bytes:
    data = b""
    while select.select([process.output_fd], [], [], 10.0)[0]:
        chunk = os.read(process.output_fd, 4096)
        if not chunk:
            process.close()
            return data
        data += chunk
    raise AssertionError(f"the output is still held open after {data!r}")


@contextlib.contextmanager
def worker(kind: str, script: str, folder: Path, marker: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, kind, script, str(folder), marker], env=env
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_job_ends_by_itself(tmp_path: Path, marker: str) -> None:
    process = start("echo out; echo err >&2; pwd; cat; exit 7", tmp_path, marker)
    assert output(process) == f"out\nerr\n{tmp_path}\n".encode()
    end = process.wait()
    assert (end.exit_code, end.was_stopped) == (7, False)
    process.stop()
    process.kill()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_job_killed_by_a_signal(tmp_path: Path, marker: str, signum: int) -> None:
    process = start(f"kill -{signum} $$", tmp_path, marker)
    assert process.wait().exit_code == -signum


def test_signals_and_descriptors_are_those_of_a_fresh_process(tmp_path: Path, marker: str) -> None:
    probe = (
        "import os, signal; "
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, sorted(os.listdir('/dev/fd')))"
    )
    read_fd, write_fd = os.pipe()
    name, _, value = marker.partition("=")
    process = GuardedProcess(
        f'grep SigBlk /proc/self/status; {sys.executable} -c "{probe}"',
        folder=tmp_path,
        env={**os.environ, name: value},
        grace_s=1,
        held_fds=(write_fd,),
        marker=marker,
    )
    os.close(write_fd)
    # 3 is the listing itself: the held descriptor is the guard's alone.
    expected = b"SigBlk:\t0000000000000000\nTrue ['0', '1', '2', '3']\n"
    assert output(process) == expected
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
    assert process.wait().exit_code == 0


def test_stop_lets_the_job_save(tmp_path: Path, marker: str) -> None:
    # The shell dies of the signal at once; what it runs is given the time to save all the same.
    (tmp_path / "trainer.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    process = start(f"{sys.executable} trainer.py; echo after", tmp_path, marker)
    wait_until((tmp_path / "ready").exists)
    process.stop()
    process.stop()
    assert process.wait().was_stopped
    assert (tmp_path / "saved").exists()
    assert not marked_processes(marker)


def test_stop_kills_after_the_grace_and_kill_at_once(tmp_path: Path, marker: str) -> None:
    for name, grace_s, least_s in (("stop", 0.5, 0.5), ("kill", NEVER_S, 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        process = start(STUBBORN, folder, marker, grace_s)
        wait_until((folder / "ready").exists)
        assert len(marked_processes(marker)) >= 5
        started = time.monotonic()
        process.stop()
        if name == "kill":
            process.kill()
        end = process.wait()
        assert least_s <= time.monotonic() - started < HANGS_S
        assert (end.exit_code, end.was_stopped) == (-signal.SIGKILL, True)
        assert not marked_processes(marker)


def test_what_a_job_leaves_behind_ends_with_it(tmp_path: Path, marker: str) -> None:
    # The daemon holds the output open: reading to its end would hang if it survived.
    process = start(
        f"setsid sleep {NEVER_S} & (setsid sleep {NEVER_S} &); echo done", tmp_path, marker
    )
    started = time.monotonic()
    assert process.wait().exit_code == 0
    assert output(process) == b"done\n"
    assert time.monotonic() - started < HANGS_S
    assert not marked_processes(marker)


def test_no_orphan_when_the_worker_is_killed(tmp_path: Path, marker: str) -> None:
    with worker("guarded", STUBBORN, tmp_path, marker) as process:
        wait_until((tmp_path / "ready").exists)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not marked_processes(marker))


def test_control_without_a_guard_the_orphans_are_seen(tmp_path: Path, marker: str) -> None:
    with worker("plain", STUBBORN, tmp_path, marker) as process:
        wait_until((tmp_path / "ready").exists)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not comes_true(lambda: not marked_processes(marker), within_s=2.0)
        assert len(marked_processes(marker)) >= 5


def test_no_orphan_when_the_guard_is_killed(tmp_path: Path, marker: str) -> None:
    process = start(STUBBORN, tmp_path, marker)
    wait_until((tmp_path / "ready").exists)
    os.kill(process._guard.pid, signal.SIGKILL)
    end = process.wait()
    assert (end.exit_code, end.was_stopped) == (None, False)
    assert not marked_processes(marker)
    process.close()


def test_the_kernel_kills_the_job_when_guard_and_worker_die_at_once(
    tmp_path: Path, marker: str
) -> None:
    with worker("guarded", "touch ready; exec sleep 9999", tmp_path, marker) as process:
        wait_until((tmp_path / "ready").exists)
        wait_until(lambda: (tmp_path / "guard").exists() and (tmp_path / "guard").read_text())
        os.kill(process.pid, signal.SIGSTOP)
        os.kill(int((tmp_path / "guard").read_text()), signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not marked_processes(marker))


def test_a_script_that_cannot_start_is_an_error_of_the_job(tmp_path: Path, marker: str) -> None:
    with pytest.raises(OSError, match="too long"):
        start("x" * 200_000, tmp_path, marker)


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "control: only stopped"])
def test_a_kill_that_comes_before_the_process_reaches_it(
    tmp_path: Path, marker: str, is_killed: bool
) -> None:
    """As when a machine is taken back while a job's files are still being fetched."""
    control = RunControl()
    control.instruct_shutdown()
    if is_killed:
        control.kill()
    process = start(f"trap '' TERM; echo up; sleep {NEVER_S}", tmp_path, marker, grace_s=NEVER_S)
    if not is_killed:
        assert os.read(process.output_fd, 3) == b"up\n"  # it ignores SIGTERM from now on
    control.attach(process)
    waiter = threading.Thread(target=process.wait, daemon=True)
    waiter.start()
    waiter.join(HANGS_S if is_killed else 0.5)
    has_ended = not waiter.is_alive()
    process.kill()
    waiter.join(HANGS_S)
    process.close()
    assert has_ended == is_killed


# A worker whose guard must hear of it, or does not have to.
PULSING = """
import os, sys
from pathlib import Path
from openweights.worker.process import GuardedProcess
script, folder, marker, silence_s = sys.argv[1:]
name, _, value = marker.partition("=")
env = {**os.environ, name: value}
process = GuardedProcess(
    script, folder=Path(folder), env=env, grace_s=5, marker=marker, silence_s=float(silence_s)
)
process.wait()
"""


@pytest.mark.parametrize("silence_s", [1.0, 0.0], ids=["watched", "control: not watched"])
def test_a_worker_that_is_stopped_has_no_job_after_its_lease(
    tmp_path: Path, marker: str, silence_s: float
) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PULSING, f"touch up; sleep {NEVER_S}", str(tmp_path), marker]
    process = subprocess.Popen([*command, str(silence_s)], env=env)
    try:
        wait_until((tmp_path / "up").exists)
        time.sleep(1.5)  # longer than the silence: the pulse keeps it
        assert marked_processes(marker)
        process.send_signal(signal.SIGSTOP)
        within_s = HANGS_S if silence_s else 4.0
        assert comes_true(lambda: not marked_processes(marker), within_s) == (silence_s > 0)
    finally:
        process.kill()
        process.send_signal(signal.SIGCONT)
        process.wait()
