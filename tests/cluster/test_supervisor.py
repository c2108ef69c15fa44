"""One process for each managed organization, with its own environment and nothing else."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights.cluster.supervisor import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Supervisor,
    manage,
    parse_env,
    unmanage,
)
from openweights.errors import ConfigurationError, InvalidInputError, NotFoundError
from tests.waiting import wait_until

# Says which keys it was started with, and waits; or ends at once.
MANAGER = (
    "import os, signal, sys, time\n"
    "print(os.environ['RUNPOD_API_KEY'], sorted(os.environ), flush=True)\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "time.sleep(0 if os.environ.get('ENDS') else 60)\n"
)


def variables(runpod_key: str, **more: str) -> str:
    values = {
        "SUPABASE_URL": "http://127.0.0.1:9",
        "SUPABASE_ANON_KEY": "anon",
        "OPENWEIGHTS_API_KEY": "ow_1",
        "RUNPOD_API_KEY": runpod_key,
        **more,
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "managed"


@pytest.fixture
def supervisor(folder: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(folder, [sys.executable, "-c", MANAGER], {"PATH": os.environ["PATH"]})
    yield supervisor
    stop = threading.Event()
    stop.set()
    supervisor.run(stop)
    assert supervisor.processes() == {}


def test_each_has_its_own_keys_and_no_others(
    supervisor: Supervisor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "of-the-supervisor")
    manage(folder, "lab", variables("rp-lab"))
    manage(folder, "other", variables("rp-other"))
    assert stat.S_IMODE((folder / "lab.env").stat().st_mode) == 0o600
    supervisor.step(0)
    first = supervisor.processes()
    assert set(first) == {"lab", "other"}
    supervisor.step(1)
    assert supervisor.processes() == first, "nothing to do"
    for name in first:
        wait_until(lambda name=name: "rp-" in (folder / f"{name}.log").read_text())
        log = (folder / f"{name}.log").read_text()
        assert f"rp-{name}" in log and "of-the-supervisor" not in log and "HOME" not in log


def test_new_secrets_restart_it_and_unmanaging_ends_it(
    supervisor: Supervisor, folder: Path
) -> None:
    manage(folder, "lab", variables("rp-1"))
    supervisor.step(0)
    first = supervisor.processes()["lab"]
    wait_until(lambda: "rp-1" in (folder / "lab.log").read_text())
    manage(folder, "lab", variables("rp-2"))
    supervisor.step(1)
    assert supervisor.processes()["lab"] != first
    wait_until(lambda: "rp-2" in (folder / "lab.log").read_text())
    unmanage(folder, "lab")
    supervisor.step(2)
    assert supervisor.processes() == {}
    with pytest.raises(NotFoundError, match="managed: none"):
        unmanage(folder, "lab")


def test_one_that_ends_is_started_again_later_each_time(
    supervisor: Supervisor, folder: Path
) -> None:
    manage(folder, "lab", variables("rp", ENDS="1"))
    manage(folder, "steady", variables("rp"))
    log = folder / "lab.log"
    now, starts = 0.0, []
    for _ in range(4):
        supervisor.step(now)
        starts.append(now)
        wait_until(lambda: log.exists() and log.read_text().count("\n") == len(starts))
        while "lab" in supervisor.processes():
            time.sleep(0.02)
            supervisor.step(now)
        pause = FIRST_PAUSE_S * 2 ** (len(starts) - 1)
        supervisor.step(now + pause - 0.1)
        assert "lab" not in supervisor.processes(), "not yet"
        assert "steady" in supervisor.processes(), "and no other waits for it"
        now += pause
    assert [later - earlier for earlier, later in zip(starts, starts[1:], strict=False)] == [
        2,
        4,
        8,
    ]


def test_a_file_that_is_wrong_keeps_nobody_else_waiting(
    supervisor: Supervisor, folder: Path
) -> None:
    manage(folder, "lab", variables("rp"))
    (folder / "broken.env").write_text("secret without a name\n")
    supervisor.step(0)
    assert set(supervisor.processes()) == {"lab"}


def test_what_manage_refuses(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="RUNPOD_API_KEY must be set"):
        manage(folder, "lab", variables(""))
    for name in ("../lab", "", ".lab", "a b"):
        with pytest.raises(InvalidInputError, match="cannot name a file"):
            manage(folder, name, variables("rp"))
    assert not folder.exists()


def test_env_files() -> None:
    text = "# a comment\n\nexport A=1\nB = 'two words'\nC=\"x\"\nD=a=b\nE=\n"
    assert parse_env(text) == {"A": "1", "B": "two words", "C": "x", "D": "a=b", "E": ""}
    quoted = "D=hf_abcdefgh # my token\nE=\"line1\\nline2\"\nG='x' # quoted\nH='${PATH} #'\n"
    values = {"D": "hf_abcdefgh", "E": "line1\nline2", "G": "x", "H": "${PATH} #"}
    assert parse_env(quoted) == values
    with pytest.raises(InvalidInputError, match="line 2 of the env file") as caught:
        parse_env("A=1\nhunter2\n")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_cannot_be_read_does_not_end_the_others(
    folder: Path, supervisor: Supervisor
) -> None:
    manage(folder, "good", variables("rp-1"))
    (folder / "bytes.env").write_bytes(b"\xff\xfe")
    (folder / "folder.env").mkdir()
    (folder / "null.env").write_text(variables("rp-\0"))
    supervisor.step(0)
    assert list(supervisor.processes()) == ["good"]


def test_a_manager_that_fails_for_days_does_not_end_the_supervisor(
    folder: Path, supervisor: Supervisor
) -> None:
    manage(folder, "lab", variables("rp-1", ENDS="1"))
    supervisor.step(0)
    (child,) = supervisor._children.values()
    child.failures = 2000  # 2.0 ** 1024 is an OverflowError
    wait_until(lambda: child.process is None or child.process.poll() is not None)
    supervisor.step(1)
    assert child.retry_at == 1 + LONGEST_PAUSE_S
