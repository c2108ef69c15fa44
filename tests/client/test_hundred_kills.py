"""A hundred times SIGKILL to random processes of the product, and nobody who waits: thirty jobs
complete, each once.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from openweights.backends.local.worker_locks import WORKER_LOCK, is_locked
from openweights.worker.process import kill_strays
from openweights.worker.standby import STANDBY_LOCK

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
JOBS = 30
KILLS = 100
SEED = 20261129
SUBMIT = """
import sys
from openweights import OpenWeights
for number in range(int(sys.argv[1])):
    OpenWeights().exec.create(
        command=f"sleep 4; echo done > uploads/{number}.txt",
        requires_vram_gb=0, max_attempts=1000,
        retry={"max": 1000, "backoff_s": 0, "on": ["any"]},
    )
"""
ROLES = {
    "openweights.worker.main": "worker",
    "openweights.worker.standby": "standby",
    "guard.py": "guard",
    SUBMIT: "client",
}


@pytest.fixture
def marker(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    marker = f"OPENWEIGHTS_HOME={home}"
    yield marker
    kill_strays(marker)


def processes(home: Path) -> dict[str, list[int]]:
    """Role -> processes; what is none of the others belongs to a job."""
    found: dict[str, list[int]] = {}
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("OPENWEIGHTS_HOME") == str(home)
            if not is_ours or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = process.cmdline()
        except psutil.Error:
            continue
        role = next((r for part, r in ROLES.items() if any(part in c for c in command)), "job")
        if process.pid != os.getpid():
            found.setdefault(role, []).append(process.pid)
    return found


def looked_after(home: Path) -> bool:
    return is_locked(home / WORKER_LOCK) and is_locked(home / STANDBY_LOCK)


def unfinished(home: Path) -> int:
    """Looked at in the database alone: a client of ours would start a worker."""
    with closing(sqlite3.connect(f"file:{home}/openweights.db?mode=ro", uri=True)) as db:
        return db.execute("SELECT count(*) FROM jobs WHERE status != 'completed'").fetchone()[0]


def submit(home: Path, count: int) -> None:
    """By a client that is killed while it does so, and one that goes away by itself."""
    command = [sys.executable, "-c", SUBMIT, str(count)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENWEIGHTS_WORKER_IDLE_S": "30"}
    killed = subprocess.Popen(command, env=env)
    while not (home / "openweights.db").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    killed.kill()
    killed.wait()
    subprocess.run(command, env=env, check=True)


def test_a_hundred_kills(
    home: Path, marker: str, record_property: Callable[[str, object], None]
) -> None:
    chance, kills = random.Random(SEED), Counter[str]({"client": 1})
    submit(home, JOBS)
    deadline = time.monotonic() + 1500
    while unfinished(home) and time.monotonic() < deadline:
        time.sleep(chance.uniform(0, 0.6))
        # One at a time: what looks after one another is there again before the next one.
        if kills.total() >= KILLS or not looked_after(home):
            continue
        found = processes(home)
        role = chance.choice(sorted(found.keys() - {"client"}))
        os.kill(chance.choice(found[role]), signal.SIGKILL)
        kills[role] += 1
    record_property("kills", dict(kills))
    assert unfinished(home) == 0
    assert kills.total() == KILLS
    assert min(kills[role] for role in ("worker", "standby", "guard", "job")) > 0
    with closing(sqlite3.connect(home / "openweights.db")) as db:
        completed = "SELECT job_id FROM runs WHERE status = 'completed'"
        assert Counter(db.execute(completed)).most_common(1)[0][1] == 1, "each once"
        assert len(db.execute("SELECT * FROM jobs").fetchall()) == JOBS
        results = "SELECT json_extract(data, '$.path') FROM events WHERE data LIKE '%result:file%'"
        assert Counter(db.execute(results)) == Counter((f"{n}.txt",) for n in range(JOBS))


def test_without_the_standby_nothing_goes_on(home: Path, marker: str) -> None:
    """The control: when both are killed at once, the jobs wait for the next command."""
    submit(home, 3)
    while not looked_after(home):
        time.sleep(0.05)
    found = processes(home)
    for pid in found["standby"] + found["worker"]:
        os.kill(pid, signal.SIGSTOP)
    for pid in found["standby"] + found["worker"]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(10)
    assert unfinished(home) > 0
