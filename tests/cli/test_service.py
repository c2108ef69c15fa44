"""`ow service`: the unit that is written, for any home, and what the service manager is told."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openweights.cli.service import launchd_agent, systemd_unit
from openweights.settings import Settings
from tests.cli.conftest import Ow

ODD = '/srv/50% of $HOME/my "jobs" & \\n\'s'
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *is-active*) test -e "$CALLS.up" ;; *--now*) touch "$CALLS.up" ;; esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `systemctl` was asked for; it answers as if all went well."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "calls"


@pytest.mark.skipif(sys.platform != "linux", reason="systemd")
def test_the_unit_is_written_started_and_removed(
    ow: Ow, calls: Path, tmp_path: Path, home: Path
) -> None:
    unit = tmp_path / "config" / "systemd" / "user" / "openweights.service"
    before = ow("service", "status", "--json")
    assert before.exit_code == 1 and not json.loads(before.stdout)["installed"]
    assert ow("service", "uninstall").exit_code == 1
    assert ow("service", "install").stdout.startswith(f"wrote {unit}\nstarted")
    assert calls.read_text().splitlines() == [
        "--user daemon-reload",
        "--user enable --now openweights.service",
    ]
    lines = unit.read_text().splitlines()
    assert f'Environment="OPENWEIGHTS_HOME={home}"' in lines and "Restart=always" in lines
    after = json.loads(ow("service", "status", "--json").stdout)
    assert (after["installed"], after["current"], after["running"]) == (True, True, True)
    unit.write_text("another")
    assert "install it again" in ow("service", "status").stderr
    assert ow("service", "uninstall").exit_code == 0
    assert not unit.exists() and "disable --now" in calls.read_text()


def test_without_a_service_manager_it_says_so(
    ow: Ow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = ow("service", "install")
    assert answer.exit_code == 1
    assert answer.stderr.startswith("ow: it is not started: there is no ")
    assert "openweights.worker.main --embedded" in answer.stderr


def test_a_projects_workers_are_not_its_business(ow: Ow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_URL", "https://x.supabase.co")
    answer = ow("service", "status")
    assert answer.exit_code == 1 and "workers are pods" in answer.stderr


def test_no_secret_stands_in_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=Path("/h"), hf_token="hf_secret", api_key="ow_secret")
    env = {"PATH": "/bin", "HF_TOKEN": "hf_secret"}
    assert "secret" not in systemd_unit(settings, env)
    assert b"secret" not in launchd_agent(settings, env)


def test_launchd_reads_what_was_meant() -> None:
    agent = plistlib.loads(launchd_agent(Settings(home=Path(ODD)), {"PATH": "/bin"}))
    assert agent["EnvironmentVariables"]["OPENWEIGHTS_HOME"] == ODD
    assert agent["ProgramArguments"][0] == sys.executable
    assert agent["KeepAlive"] is agent["RunAtLoad"] is True


@pytest.mark.parametrize("home", ["/srv/home", ODD])
def test_systemd_reads_what_was_meant(tmp_path: Path, home: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "openweights.service"
    unit.write_text(systemd_unit(Settings(home=Path(home)), {"PATH": "/bin"}))
    command = ["systemd-analyze", "--user", "verify", str(unit)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "openweights.service:" not in answer.stderr, "no line is ignored"


def test_systemds_quoting() -> None:
    """As systemd's documentation has it: C escapes, `%%` for `%`, and `$$` for `$` in commands."""
    lines = systemd_unit(Settings(home=Path(ODD)), {"PATH": "/bin"}).splitlines()
    assert 'Environment="OPENWEIGHTS_HOME=/srv/50%% of $HOME/my \\"jobs\\" & \\\\n\'s"' in lines
    assert all(line.isascii() and "\t" not in line for line in lines)
