"""The self-started worker, end to end: submit, and it runs; kill it, and another one goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from openweights import JobFailedError, OpenWeights, PlatformError
from openweights.backends.local.worker_locks import is_locked
from openweights.client.local_worker import LocalWorker, log_path, own_threads, workers_beside
from openweights.client.serving.sampling import submit
from openweights.client.watching.queue import waits_for
from openweights.settings import Settings
from openweights.worker.standby import STANDBY_LOCK
from tests.tiny_model import make_tiny_model
from tests.waiting import HANGS_S, comes_true, has_ended, until_exists, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def ow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenWeights]:
    """A client in an empty folder, that starts workers as it does for a user."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    client = OpenWeights()
    yield client
    client.close()


def workers(home: Path, module: str = "openweights.worker.main") -> list[psutil.Process]:
    """Worker processes of that store, or those of another module."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if module not in command:
                continue
            if process.environ().get("OPENWEIGHTS_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_gone(home: Path) -> None:
    wait_until(lambda: all(has_ended(process.pid) for process in workers(home)))


def test_a_script_needs_no_worker(ow: OpenWeights, home: Path) -> None:
    ow.run.log({"n": 1})
    assert ow.jobs.list(status="in_progress")[0].type == "script"
    ow.ensure_worker()
    assert workers(home) == [] and not log_path(ow.settings).exists()


def test_submitted_job_runs_and_the_worker_goes_away(
    ow: OpenWeights, home: Path, tmp_path: Path
) -> None:
    Path("say.py").write_text("import sys; print('hello', sys.argv[1])")
    Path("in.txt").write_text("from the file")
    command = 'python say.py "$(cat in.txt)" && mkdir -p uploads && echo result > uploads/r.txt'
    job = ow.exec.create(command=command, requires_vram_gb=0)
    text = "".join(job.logs(follow=True))
    assert "hello from the file\n" in text
    assert job.wait(timeout=HANGS_S).status == "completed"
    assert job.logs() == text
    job.download(tmp_path / "results")
    assert (tmp_path / "results" / "r.txt").read_text() == "result\n"
    # Submitted again it is the same job, done already.
    assert ow.exec.create(command=command).status == "completed"
    failed = ow.exec.create(command="echo to stderr >&2; exit 3", requires_vram_gb=0)
    with pytest.raises(JobFailedError, match=r"exit code 3(.|\n)*to stderr"):
        failed.wait(timeout=HANGS_S)
    assert len(ow.backend.list_workers()) == 1, "one worker did both"
    wait_until_gone(home)
    assert ow.backend.list_workers(statuses=["active"]) == []
    assert ow.exec.create(command="echo again").wait(timeout=HANGS_S).status == "completed"


def test_killed_worker_is_replaced(ow: OpenWeights, home: Path, tmp_path: Path) -> None:
    held = until_exists(tmp_path / "go")
    job = ow.exec.create(command=f"echo begin; {held}; echo end", requires_vram_gb=0)
    for text in job.logs(follow=True):
        if "begin" in text:
            break
    kill(workers(home))
    (tmp_path / "go").touch()
    assert job.wait(timeout=HANGS_S).status == "completed"
    assert [run.status for run in job.runs] == ["failed", "completed"]
    assert "".join(job.logs()).endswith("begin\nend\n")


SUBMIT = """
import sys
from openweights import OpenWeights
job = OpenWeights().exec.create(command="echo " + sys.argv[1], requires_vram_gb=0)
job.wait(timeout=240)
"""


def test_clients_at_the_same_time_share_one_worker(ow: OpenWeights, home: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    clients = [
        subprocess.Popen([sys.executable, "-c", SUBMIT, str(number)], env=env)
        for number in range(4)
    ]
    assert [client.wait(timeout=240) for client in clients] == [0] * 4
    assert [job.status for job in ow.jobs.list()] == ["completed"] * 4
    assert len(ow.backend.list_workers()) == 1


def test_worker_outlives_the_client(ow: OpenWeights, home: Path) -> None:
    code = SUBMIT.replace("job.wait(timeout=240)", "print(job.id)")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, "later"]
    client = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    job = ow.jobs.retrieve(client.stdout.strip())
    wait_until(lambda: job.refresh().status == "completed")


def test_worker_that_cannot_start_is_reported(
    ow: OpenWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    worker = LocalWorker(ow.settings, "jobs")
    with pytest.raises(PlatformError) as caught:
        wait_until(lambda: worker.ensure(alive=0, wanted=1))
    first = str(caught.value).splitlines()[0]
    assert first.startswith("the worker ends at once (exit code 1); ")
    assert first.endswith("/worker.log ends with:")
    assert "encodings" in str(caught.value), "the reason is told"
    assert str(caught.value).count("Fatal Python error") <= log_path(ow.settings).read_text().count(
        "Fatal Python error"
    )


def test_settings_reach_the_worker(home: Path) -> None:
    settings = Settings(home=home, lease_s=7.5, heartbeat_s=0.5, hf_token="secret", run_id=3)
    env = settings.child_env({"OPENWEIGHTS_RUN_ID": "3", "OPENWEIGHTS_SPOOL": "/x", "PATH": "/bin"})
    assert Settings.from_env(env) == Settings(
        home=home, lease_s=7.5, heartbeat_s=0.5, hf_token="secret"
    )
    assert env["PATH"] == "/bin"


def test_signals_to_the_client_do_not_reach_the_worker(ow: OpenWeights, home: Path) -> None:
    job = ow.exec.create(command="sleep 0.5; echo done", requires_vram_gb=0)
    (worker,) = workers(home)
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
    assert job.wait(timeout=HANGS_S).status == "completed"
    worker.send_signal(signal.SIGTERM)
    wait_until_gone(home)


def _ends_without_a_client(home: Path, job_id: str, within_s: float) -> bool:
    """Looked at in the database alone: a client would start a worker."""
    query = "SELECT status FROM jobs WHERE id = ?"
    with closing(sqlite3.connect(f"file:{home}/openweights.db?mode=ro", uri=True)) as db:
        return comes_true(
            lambda: db.execute(query, (job_id,)).fetchone() == ("completed",), within_s
        )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_whose_worker_is_killed_goes_on_without_a_client(
    ow: OpenWeights, home: Path, tmp_path: Path, signum: int
) -> None:
    held = until_exists(tmp_path / "go")
    job = ow.exec.create(command=f"touch uploads/$$; {held}", requires_vram_gb=0)
    wait_until(lambda: job.refresh().status == "in_progress" and is_locked(home / STANDBY_LOCK))
    (worker,) = workers(home)
    worker.send_signal(signum)
    assert not _ends_without_a_client(home, job.id, 0.5), "the control: it is held"
    (tmp_path / "go").touch()
    assert _ends_without_a_client(home, job.id, HANGS_S)
    assert job.refresh().attempts == 2


def test_without_its_standby_a_killed_workers_job_waits(ow: OpenWeights, home: Path) -> None:
    """The control; and a standby that is killed is started again by the worker."""
    job = ow.exec.create(command="sleep 9999", requires_vram_gb=0)
    wait_until(lambda: job.refresh().status == "in_progress" and is_locked(home / STANDBY_LOCK))
    first = workers(home, "openweights.worker.standby")
    kill(first)
    second = wait_until(lambda: set(workers(home, "openweights.worker.standby")) - set(first))
    # Both at once, as when the machine is switched off.
    kill([*workers(home), *second])
    assert not _ends_without_a_client(home, job.id, 3)
    job.cancel()


@pytest.mark.usefixtures("warm_jobs")
def test_a_question_is_answered_beside_a_job_that_runs(ow: OpenWeights, tmp_path: Path) -> None:
    """And before those that wait; the control, without its priority, waits for all of them."""
    tiny = str(make_tiny_model(tmp_path / "tiny"))
    long = ow.exec.create(command="sleep 9999", requires_vram_gb=0)
    while long.refresh().status == "pending":  # else the question is taken before it
        time.sleep(0.05)
    queued = ow.exec.create(command="sleep 9998", requires_vram_gb=0)
    plain = submit(ow, [tiny], ["q"], {"max_tokens": 2, "priority": 0})
    asked = submit(ow, [tiny], ["q", "r"], {"max_tokens": 2})
    assert asked.wait(timeout=240).status == "completed"
    words = waits_for(ow.backend, plain.refresh().record, is_remote=False)
    assert [job.refresh().status for job in (long, queued, plain)] == [
        "in_progress",
        "pending",
        "pending",
    ]
    assert words == f"behind {long.id} and 1 more"
    plain.cancel()
    queued.cancel()
    long.cancel()


def test_workers_beside_one_another_work_until_the_block_ends(
    ow: OpenWeights, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meet = "touch {0} && for i in $(seq 1200); do [ -e {1} ] && exit 0; sleep 0.2; done; exit 1"
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        pytest.raises(KeyboardInterrupt) as stopped,
        workers_beside(ow.settings, ow.backend, 2),
    ):
        jobs = [
            ow.exec.create(command=meet.format(own, other), requires_vram_gb=0)
            for own, other in ((first, second), (second, first))
        ]
        # Each ends only while the other runs.
        assert [job.wait(timeout=240).status for job in jobs] == ["completed"] * 2
        assert len(workers(home)) == 2
        late = ow.exec.create(command="sleep 9999", requires_vram_gb=0)
        while late.refresh().status == "pending":
            time.sleep(0.05)
        interrupt = KeyboardInterrupt()
        interrupt.add_note(f"job {late.id} goes on")  # as `late.wait()` would have said
        raise interrupt
    [told] = stopped.value.__notes__  # the job goes on only when this is run again
    assert workers(home) == [] and "run it again" in told
    assert late.refresh().status == "pending", "given back"
    assert [m for m in caplog.messages if m.startswith("stopping the workers: ")], "before the wait"


def test_who_interrupts_is_told_what_goes_on(
    ow: OpenWeights, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt) as idle, workers_beside(ow.settings, ow.backend, 2):
        raise KeyboardInterrupt
    assert "run it again" in idle.value.__notes__[0], "the control: nobody else works"
    assert not [m for m in caplog.messages if "stopping" in m], "nothing to wait for"
    job = ow.exec.create(command="sleep 9999", requires_vram_gb=0)  # which starts a worker
    while job.refresh().status == "pending":
        time.sleep(0.05)
    for count in (1, 2):
        with (
            pytest.raises(KeyboardInterrupt) as stopped,
            workers_beside(ow.settings, ow.backend, count),
        ):
            raise KeyboardInterrupt
        [told] = stopped.value.__notes__
        assert "`ow cancel JOB` stops one" in told and "run it again" not in told
    assert job.refresh().status == "in_progress"
    job.cancel()


BESIDE = """
import signal
import time
from openweights import OpenWeights
from openweights.client.local_worker import workers_beside
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where tests run under nohup
ow = OpenWeights()
with workers_beside(ow.settings, ow.backend, 2):
    job = ow.exec.create(command="sleep 9999", requires_vram_gb=0)
    while job.refresh().status == "pending":
        time.sleep(0.05)
    print(job.id, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_beside_a_process_end_with_it(ow: OpenWeights, home: Path, signum: int) -> None:
    """However it ends; `test_worker_outlives_the_client` is about the others."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", BESIDE]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        job = ow.jobs.retrieve(parent.stdout.readline().strip())
        assert len(workers(home)) == 2
        parent.send_signal(signum)
        assert parent.wait(timeout=HANGS_S) == -signum
    wait_until_gone(home)
    assert job.refresh().status == "pending", "given back"
    assert "the process that started this worker is gone" in log_path(ow.settings).read_text()


def test_processes_that_compute_side_by_side_share_the_cores() -> None:
    cores = os.cpu_count() or 1
    assert own_threads(1) == cores and own_threads(cores) == 1 and own_threads(2 * cores) == 1
