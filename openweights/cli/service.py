"""`ow service`: a worker that is always there, also after a reboot, as a unit of systemd, or of
launchd on macOS, of the user who asks for it.
"""

from __future__ import annotations

import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from openweights.cli.output import fail, json_option, note, print_fields, print_json
from openweights.errors import ConfigurationError
from openweights.settings import Settings, service_variables

_NAME = "openweights"
_LABEL = "org.openweights.worker"
_YEAR_S = 365 * 86_400
_REPORT_S = 30.0  # beside the job's grace: for delivering what it left


@dataclass(frozen=True, slots=True)
class Unit:
    """What is installed.

    Attributes:
        start, stop: Commands that make the service manager read it, and forget it.
        ask: One that succeeds while the worker runs.
    """

    path: Path
    content: bytes
    start: Sequence[Sequence[str]]
    stop: Sequence[Sequence[str]]
    ask: Sequence[str]


@click.group()
def service() -> None:
    """Keep a worker running here, also after a reboot."""


@service.command()
@click.option("--print", "only_print", is_flag=True, help="Only print what would be written.")
def install(only_print: bool) -> None:
    """Write a unit for your service manager, and start it.

    The worker has OPENWEIGHTS_HOME and PATH as they are now. What else its jobs need, such as
    HF_TOKEN=…, goes into the file service.env in that folder, a line each (systemd only).
    """
    unit = _unit()
    if only_print:
        click.echo(unit.content.decode(), nl=False)
        return
    unit.path.parent.mkdir(parents=True, exist_ok=True)
    unit.path.write_bytes(unit.content)
    click.echo(f"wrote {unit.path}")
    if problem := _run_all(unit.start):
        fail(f"it is not started: {problem}")
    click.echo("started; `ow service status` looks after it")
    if sys.platform == "linux":
        note("to have it run while you are not logged in: loginctl enable-linger")


@service.command()
def uninstall() -> None:
    """Stop the worker and remove the unit; its job goes back to the queue."""
    unit = _unit()
    if not unit.path.exists():
        fail(f"there is no {unit.path}")
    problem = _run_all(unit.stop)
    unit.path.unlink()
    click.echo(f"removed {unit.path}")
    if problem:
        fail(f"it may still run: {problem}")


@service.command()
@json_option
def status(as_json: bool) -> None:
    """Show whether it is installed, and whether it runs; the exit code is 1 if it does not."""
    unit = _unit()
    is_installed = unit.path.exists()
    values = {
        "unit": str(unit.path),
        "installed": is_installed,
        "current": is_installed and unit.path.read_bytes() == unit.content,
        "running": is_installed and _problem_of(unit.ask) is None,
    }
    if as_json:
        print_json(values)
    else:
        print_fields(values)
        if is_installed and not values["current"]:
            note("the unit is that of other settings, or of another version: install it again")
    sys.exit(0 if values["running"] else 1)


# ---- what is written: decided from the settings alone --------------------------------------------


def worker_command() -> list[str]:
    """What runs: the worker that otherwise starts by itself."""
    return [sys.executable, "-m", "openweights.worker.main", "--embedded"]


def worker_variables(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """Its environment, but for what is secret: the unit's file may be read by others."""
    return {
        "OPENWEIGHTS_HOME": str(settings.home),
        "OPENWEIGHTS_WORKER_IDLE_S": str(_YEAR_S),
        "PATH": env.get("PATH", os.defpath),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SUPABASE_URL": "",  # not the project that `ow login` may have named meanwhile
    }


def systemd_unit(settings: Settings, env: Mapping[str, str]) -> str:
    """A unit of systemd for a user."""
    variables = worker_variables(settings, env).items()
    lines = [
        "[Unit]",
        f"Description=openweights: the jobs of {_specifiers(_one_line(str(settings.home)))}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "ExecStart=" + " ".join(_quoted(word).replace("$", "$$") for word in worker_command()),
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in variables),
        f"EnvironmentFile=-{_specifiers(str(settings.home / 'service.env'))}",
        "Restart=always",
        "RestartSec=5",
        # The worker alone hears of the end, and lets its job save; one job that takes all memory
        # does not end the others'.
        "KillMode=mixed",
        f"TimeoutStopSec={settings.cancel_grace_s + _REPORT_S:.0f}",
        "OOMPolicy=continue",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def launchd_agent(settings: Settings, env: Mapping[str, str]) -> bytes:
    """An agent of launchd for a user."""
    log = str(settings.home / "worker.log")
    return plistlib.dumps(
        {
            "Label": _LABEL,
            "ProgramArguments": worker_command(),
            "EnvironmentVariables": worker_variables(settings, env),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 5,
            "ExitTimeOut": int(settings.cancel_grace_s + _REPORT_S),
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
    )


def _quoted(word: str) -> str:
    """As systemd reads a word: C escapes in double quotes, and `%` for its own names."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{_specifiers(escaped)}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- the service manager -------------------------------------------------------------------------


def _unit() -> Unit:
    settings = Settings.from_env()
    if settings.is_remote:
        raise ConfigurationError(
            "the store is a project's, whose workers are pods: `ow worker` runs one here for it; "
            "`SUPABASE_URL= ow service …` is about the store on this machine"
        )
    env = service_variables()
    if sys.platform == "darwin":
        path = Path.home() / "Library" / "LaunchAgents" / f"{_LABEL}.plist"
        domain = f"gui/{os.getuid()}"
        start = (("launchctl", "bootstrap", domain, str(path)),)
        stop = (("launchctl", "bootout", f"{domain}/{_LABEL}"),)
        ask = ("launchctl", "print", f"{domain}/{_LABEL}")
        return Unit(path, launchd_agent(settings, env), start, stop, ask)
    folder = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    systemctl = ("systemctl", "--user")
    name = f"{_NAME}.service"
    return Unit(
        folder / "systemd" / "user" / name,
        systemd_unit(settings, env).encode(),
        ((*systemctl, "daemon-reload"), (*systemctl, "enable", "--now", name)),
        ((*systemctl, "disable", "--now", name), (*systemctl, "daemon-reload")),
        (*systemctl, "is-active", "--quiet", name),
    )


def _run_all(commands: Sequence[Sequence[str]]) -> str | None:
    return next((problem for command in commands if (problem := _problem_of(command))), None)


def _problem_of(command: Sequence[str]) -> str | None:
    """Why a command failed; None if it did not."""
    if shutil.which(command[0]) is None:
        return (
            f"there is no {command[0]} here; start `{shlex.join(worker_command())}` some other way"
        )
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return None
    reason = _one_line(answer.stderr or answer.stdout) or f"exit code {answer.returncode}"
    return f"`{shlex.join(command)}`: {reason}"
