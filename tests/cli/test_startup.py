"""`ow --help` costs next to nothing, and its one-line helps are those of the commands."""

from __future__ import annotations

import resource
import subprocess
import sys

import click
import pytest

from openweights import __version__
from openweights.cli import COMMANDS, main
from tests.cli.conftest import Ow, process_env

HEAVY = ("pydantic", "rich", "torch", "transformers", "sqlite3", "openweights.client")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['ow', '--help']\n"
        "from openweights.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env=process_env(), capture_output=True, text=True, check=True
    )
    assert answer.stdout.splitlines()[-1] == "[]"
    shown = " ".join(answer.stdout.split())
    for name, (_, text) in COMMANDS.items():
        assert f" {name} {text} " in f" {shown} "


def test_help_is_quick() -> None:
    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    spent: list[float] = []
    for _ in range(5):
        before = cpu_s()
        command = [sys.executable, "-m", "openweights.cli", "--help"]
        subprocess.run(command, env=process_env(), capture_output=True, check=True)
        spent.append(cpu_s() - before)
    # The least of several: other processes of a busy machine only ever add to it.
    assert min(spent) < 0.150


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(ow: Ow, name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.get_short_help_str(limit=200) == COMMANDS[name][1]
    answer = ow(name, "-h")
    assert answer.exit_code == 0
    assert answer.stdout.startswith(f"Usage: ow {name} ")


def test_version(ow: Ow) -> None:
    for arguments in (["version"], ["--version"]):
        assert ow(*arguments).stdout == f"openweights {__version__}\n"
