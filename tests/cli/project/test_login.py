"""`ow login` and `ow logout`: what they store, who may read it, and what wins over it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from openweights.credentials import Credentials, credentials_path, write_credentials
from openweights.settings import Settings
from tests.cli.conftest import Ow
from tests.supabase_double.team import Team
from tests.waiting import HANGS_S

STORED = Credentials("https://stored.example", "anon-stored", "ow_stored")


def login(ow: Ow, team: Team, key: str) -> Any:
    return ow("login", "--url", team.url, "--anon-key", team.anon_key, stdin=f"{key}\n")


def test_login_stores_what_works_and_logout_removes_it(ow: Ow, team: Team, home: Path) -> None:
    key = team.key("member")
    answer = login(ow, team, key)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == "logged in to Lab as admin@lab.example\n"
    path = home / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in answer.output and os.listdir(home) == ["credentials.json"]

    who = json.loads(ow("whoami", "--json").stdout)
    assert (who["role"], who["organization"], who["url"]) == ("member", "Lab", team.url)
    assert key not in ow("whoami").output
    # The next login takes its place.
    assert login(ow, team, team.admin_key).exit_code == 0
    assert "admin" in ow("whoami").stdout and stat.S_IMODE(path.stat().st_mode) == 0o600

    assert ow("logout").exit_code == 0 and not path.exists()
    assert ow("logout").stdout == "you were not logged in\n"
    refused = ow("whoami")
    assert refused.exit_code == 1 and "log in with `ow login`" in refused.stderr


def test_what_does_not_work_is_not_stored(ow: Ow, team: Team, home: Path) -> None:
    unknown = "ow_" + "0" * 48
    for key, reason in (
        (unknown, "does not know the key"),
        ("secret", "begin with ow_"),
        ("", "no key was given"),
    ):
        answer = login(ow, team, key)
        assert answer.exit_code == 1 and reason in answer.stderr, answer.output
        assert unknown not in answer.output
    assert not credentials_path(home).exists()
    for arguments in (["login"], ["login", "--url", "x"], ["login", "x"]):
        answer = ow(*arguments, stdin="ow_x")
        assert answer.exit_code == 2 and "Error: " in answer.stderr
    assert "no address" in ow("login", "--url", "x", "--anon-key", "y", stdin="ow_x").stderr


def test_a_damaged_file_is_said_and_mended(ow: Ow, team: Team, home: Path) -> None:
    home.mkdir()
    for text in ("{", "[]", '{"api_key": "ow_leak"}', "null", '{"a": 1}'):
        credentials_path(home).write_text(text)
        answer = ow("ls")
        assert answer.exit_code == 1 and "`ow login` writes it anew" in answer.stderr
        assert "ow_leak" not in answer.output
    assert login(ow, team, team.admin_key).exit_code == 0 and ow("ls").exit_code == 0


def test_the_environment_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_credentials(home, STORED)
    found = Settings.from_env()
    assert (found.supabase_url, found.supabase_anon_key, found.api_key) == (
        "https://stored.example",
        "anon-stored",
        "ow_stored",
    )
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", "ow_env")
    assert Settings.from_env().api_key == "ow_env"
    assert Settings.from_env().supabase_url == "https://stored.example"
    # A stored key goes to no other project.
    monkeypatch.delenv("OPENWEIGHTS_API_KEY")
    monkeypatch.setenv("SUPABASE_URL", "https://other.example")
    found = Settings.from_env()
    assert (found.supabase_url, found.supabase_anon_key, found.api_key) == (
        "https://other.example",
        None,
        None,
    )
    # Set to nothing, it means the store on this machine.
    monkeypatch.setenv("SUPABASE_URL", "")
    assert not Settings.from_env().is_remote


def test_children_do_what_their_parent_was_told(home: Path) -> None:
    """A worker of the store on this machine stays one, whoever logs in meanwhile."""
    local = Settings(home=home)
    write_credentials(home, STORED)
    assert Settings.from_env().is_remote, "the control"
    assert not Settings.from_env(local.child_env()).is_remote
    stored = Settings.from_env()
    credentials_path(home).unlink()
    assert Settings.from_env(stored.child_env()).api_key == "ow_stored"


def test_login_warns_of_an_environment_that_wins(
    ow: Ow, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", team.admin_key)
    answer = login(ow, team, team.key("member"))
    assert answer.exit_code == 0 and "is set here and wins" in answer.stderr


def test_the_key_is_asked_for_without_echo(team: Team) -> None:
    """At a terminal, whose other end sees everything that is shown."""
    import pty
    import subprocess
    import sys

    from tests.cli.conftest import process_env

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "openweights.cli", "login", "--url", team.url]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=process_env(), close_fds=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = _read_until(ours, b"Public (anon) key")
        os.write(ours, team.anon_key.encode() + b"\n")
        shown += _read_until(ours, b"Your key")
        os.write(ours, team.admin_key.encode() + b"\n")
        shown += _read_until(ours, b"logged in to Lab")
        assert process.wait(timeout=HANGS_S) == 0
    os.close(ours)
    assert team.anon_key.encode() in shown, "the control: what is echoed is seen"
    assert team.admin_key.encode() not in shown


def _read_until(fd: int, text: bytes) -> bytes:
    shown = b""
    while text not in shown:
        shown += os.read(fd, 4096)
    return shown
