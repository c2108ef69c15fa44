"""Whatever one types, whatever the home is like: a clear line, exit code 1 or 2, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights.backends.base import Backend
from openweights.cli import _CALLED_ELSEWHERE, COMMANDS
from tests.cli.conftest import Ow, claim, process_env, submit
from tests.waiting import HANGS_S

Process = Callable[..., subprocess.CompletedProcess[str]]

NONSENSE = [
    ["bogus"],
    ["--bogus"],
    ["ls", "--status", "done"],
    ["ls", "--status"],
    ["ls", "--limit", "0"],
    ["ls", "--limit", "-3"],
    ["ls", "--limit", "many"],
    ["ls", "extra"],
    ["show"],
    ["show", ""],
    ["show", " "],
    ["show", "-"],
    ["show", "nojob-0123456789ab"],
    ["show", "../../etc/passwd"],
    ["show", "a/b"],
    ["show", "%"],
    ["show", "'; drop table jobs; --"],
    ["show", "\udcff\udcfe"],
    ["show", "ftjob\n"],
    ["show", "\x1b[2J"],
    ["show", "x" * 100_000],
    ["show", "one", "two"],
    ["show", "ftjob"],
    ["logs"],
    ["logs", "nojob"],
    ["logs", "-f", "nojob"],
    ["logs", "ftjob-one", "--run-id", "x"],
    ["logs", "ftjob-one", "--run-id", "99999"],
    ["logs", "ftjob-one", "--run-id", "-1"],
    ["logs", "ftjob-one", "-f", "--run-id", "99999999999999999999999"],
    ["logs", "ftjob-one", "--json"],
    ["events", "nojob"],
    ["events", "ftjob-one", "--run-id", "7"],
    ["events", "ftjob-one", "--tag"],
    ["cancel", "nojob"],
    ["cancel", "ftjob"],
    ["cancel"],
    ["restart", "ftjob-one"],
    ["restart", "../x"],
    ["fetch"],
    ["fetch", "result:file-000000000000"],
    ["fetch", ":"],
    ["fetch", "result:"],
    ["fetch", "a:../../../etc/passwd"],
    ["fetch", "result:file-\x00"],
    ["fetch", "nojob"],
    ["fetch", "", "-o", "x"],
    ["exec"],
    ["exec", ""],
    ["exec", "  "],
    ["exec", "--cloud-type", "PRIVATE", "true"],
    ["exec", "--requires-vram-gb", "lots", "true"],
    ["exec", "--requires-vram-gb", "-1", "true"],
    ["exec", "--allowed-hardware", "", "true"],
    ["exec", "--allowed-hardware", "many x GPUs?", "true"],
    ["exec", "--wait", "--json", "true"],
    ["exec", "echo a b", "c"],
    ["exec", "echo a", "--bogus"],
    ["exec", "--bogus", "true"],
    ["worker", "--forever"],
    ["version", "please"],
    ["doctor", "--fix"],
    ["demo", "--bogus"],
]


@pytest.mark.parametrize("arguments", NONSENSE, ids=lambda words: " ".join(words)[:40])
def test_nonsense_is_refused_in_one_line(
    ow: Ow,
    backend: Backend,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    submit(backend, "ftjob-one")
    submit(backend, "ftjob-two")
    monkeypatch.chdir(tmp_path)
    answer = ow(*arguments)
    check_refusal(answer.exit_code, answer.stderr)
    assert answer.stdout == ""
    assert not (home / "errors").exists(), "a fault of ours: its traceback was written"
    assert {job.status for job in backend.list_jobs()} == {"pending"}


def check_refusal(exit_code: int, stderr: str) -> None:
    """One line of ours, or click's usage, and no traceback."""
    assert exit_code in (1, 2), stderr
    assert "Traceback" not in stderr
    assert "\x1b" not in stderr
    if exit_code == 2:
        assert stderr.startswith(("Usage: ow", "Error: "))
        assert "Error: " in stderr
    else:
        assert stderr.startswith("ow: ")
        assert stderr.count("\n") == 1
        assert len(stderr) < 600


BROKEN_SETTINGS = {
    "lease": {"OPENWEIGHTS_LEASE_S": "soon"},
    "heartbeat": {"OPENWEIGHTS_HEARTBEAT_S": "nan"},
    "run": {"OPENWEIGHTS_RUN_ID": "inf"},
    "home": {"OPENWEIGHTS_HOME": "~no-such-user-here/x"},
    "key": {"OPENWEIGHTS_API_KEY": "ow_x"},
}


@pytest.mark.parametrize("name", BROKEN_SETTINGS)
@pytest.mark.parametrize("command", ["ls", "doctor"])
def test_broken_settings(ow_process: Process, name: str, command: str) -> None:
    answer = ow_process(command, env=BROKEN_SETTINGS[name])
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr + answer.stdout
    if command == "ls":
        check_refusal(answer.returncode, answer.stderr)
    else:
        assert "FAIL" in answer.stdout
    (variable,) = BROKEN_SETTINGS[name]
    assert variable in answer.stderr + answer.stdout


def test_a_home_that_cannot_be_made(ow_process: Process, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = {"OPENWEIGHTS_HOME": str(tmp_path / "file" / "home")}
    for arguments in (
        *(["ls"], ["show", "x"], ["exec", "true"], ["cancel", "x"], ["top"], ["gc"], ["pause"]),
        *(["plot", "x"], ["chat", "ftjob-0"], ["serve", "--port", "0"]),
    ):
        answer = ow_process(*arguments, env=env, cwd=tmp_path)
        check_refusal(answer.returncode, answer.stderr)
        assert str(tmp_path / "file") in answer.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_without_permission(ow_process: Process, home: Path) -> None:
    home.mkdir()
    home.chmod(0o500)
    answer = ow_process("ls")
    check_refusal(answer.returncode, answer.stderr)
    assert str(home) in answer.stderr


@pytest.mark.parametrize("content", [b"this is no database, whatever it says" * 100, b"\0" * 8192])
def test_a_corrupt_database(ow_process: Process, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "broken"
    env = {"OPENWEIGHTS_HOME": str(folder)}
    assert ow_process("ls", env=env).returncode == 0
    for path in folder.glob("openweights.db*"):
        path.unlink()
    (folder / "openweights.db").write_bytes(content)
    answer = ow_process("ls", env=env)
    check_refusal(answer.returncode, answer.stderr)
    assert "traceback" not in answer.stderr
    assert "openweights.db" in answer.stderr


def test_a_pipe_that_closes_early_is_no_error(backend: Backend) -> None:
    run = claim(backend, "ftjob-loud").run
    backend.append_log(run.id, 0, b"line\n" * 200_000)
    command = [sys.executable, "-m", "openweights.cli", "logs", "ftjob-loud"]
    with subprocess.Popen(
        command, env=process_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""


def test_interrupt_is_quiet(backend: Backend) -> None:
    run = claim(backend, "ftjob-slow").run
    backend.append_log(run.id, 0, b"begun\n")
    command = [sys.executable, "-m", "openweights.cli", "logs", "-f", "ftjob-slow"]
    with subprocess.Popen(
        command, env=process_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=HANGS_S) == 130
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "ftjob-one", "--prompts"],
        ["cluster", "--env-file"],
        ["cluster", "--dry-run", "--jobs"],
        ["manage", "start", "org", "--env-file"],
        ["env", "import"],
        ["infer", "org/model"],
    ],
    ids=" ".join,
)
def test_a_file_that_is_no_text_is_named(
    ow: Ow, backend: Backend, tmp_path: Path, arguments: list[str]
) -> None:
    submit(backend, "ftjob-one")
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\r\n\xff\xfe")
    answer = ow(*arguments, str(file))
    assert answer.exit_code == 1, answer.output
    assert "picture.png" in answer.stderr and "UTF-8" in answer.stderr
    assert "traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"messages": 5}', "messages: is the number 5"),
        ('{"messages": []}', "messages: is empty"),
        ('{"messages": ["Hi"]}', "messages[0]: is a string"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: is missing"),
    ],
)
def test_a_prompt_that_is_none_is_named(
    ow: Ow, backend: Backend, tmp_path: Path, line: str, wrong: str
) -> None:
    submit(backend, "ftjob-one")
    (tmp_path / "prompts.jsonl").write_text(line)
    answer = ow("sample", "ftjob-one", "--prompts", str(tmp_path / "prompts.jsonl"))
    assert answer.exit_code == 1 and f"prompts.jsonl:1: {wrong}" in answer.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("shw", "show"),
        ("dashboard", "serve"),
        ("evaluate", "eval"),
        ("lst", "ls"),
        ("qqq", "--help"),
    ],
)
def test_a_command_that_does_not_exist_is_answered_with_one_that_does(
    ow: Ow, typed: str, meant: str
) -> None:
    answer = ow(typed)
    assert answer.exit_code == 2
    assert f"'ow {meant}'" in answer.stderr


def test_what_other_programs_call_the_commands_leads_to_ours() -> None:
    assert set(_CALLED_ELSEWHERE.values()) <= set(COMMANDS)
    assert not set(_CALLED_ELSEWHERE) & set(COMMANDS)
