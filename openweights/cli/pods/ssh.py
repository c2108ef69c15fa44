"""`ow ssh`."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from openweights import images
from openweights.cli.jobs.exec import ShellCommand
from openweights.cli.output import INTERRUPTED, env_file_option, note
from openweights.errors import (
    ConfigurationError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
)
from openweights.settings import ClusterSettings, Settings

if TYPE_CHECKING:
    from openweights.cluster.planning.observation import Pod, PodCloud
    from openweights.cluster.pods.development import Wish
    from openweights.cluster.pods.runpod import RunPod

WORK = "/workspace"
CONNECT_TRIES = 12
CONNECT_S = 10
CONNECT_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """An SSH server, and how to log in.

    Attributes:
        known_hosts: A file of our own: addresses of pods are used again by others.
    """

    host: str
    port: int
    key: Path
    known_hosts: Path

    def command(self, remote: str | None, *, interactive: bool) -> list[str]:
        """The `ssh` that runs `remote`, or a shell."""
        return [
            *("ssh", "-i", str(self.key), "-p", str(self.port)),
            *("-o", "StrictHostKeyChecking=accept-new", "-o", f"ConnectTimeout={CONNECT_S}"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "IdentitiesOnly=yes"),
            *("-o", "ServerAliveInterval=30", *(("-t",) if interactive else ())),
            f"root@{self.host}",
            *(() if remote is None else (remote,)),
        ]


@click.command("ssh", cls=ShellCommand)
@click.argument("command", nargs=-1)
@click.option("--gpu", default="L40", show_default=True, help="Such as L40 or 'A100 SXM 80GB'.")
@click.option("--count", type=click.IntRange(1, 8), default=1, show_default=True, help="GPUs.")
@click.option(
    "--cloud-type",
    type=click.Choice(["SECURE", "COMMUNITY"], case_sensitive=False),
    default="SECURE",
    show_default=True,
    help="Tier of the pod.",
)
@click.option(
    "--image",
    default=images.UNSLOTH_IMAGE,
    envvar="OPENWEIGHTS_IMAGE",
    show_default=True,
    show_envvar=True,
    help="Container image.",
)
@click.option(
    "--key-path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("~/.ssh/id_ed25519"),
    show_default=True,
    help="Your private key; the public one lies beside it, as KEY.pub.",
)
@env_file_option
@click.option("--sync", is_flag=True, help="Copy this folder's files to /workspace first.")
@click.option("--keep", is_flag=True, help="Leave the pod running, and say how to end it.")
@click.option("--ls", "is_listing", is_flag=True, help="List development pods that run.")
@click.option("--end", metavar="NAME", help="End a development pod.")
def ssh(
    command: tuple[str, ...],
    gpu: str,
    count: int,
    cloud_type: PodCloud,
    image: str,
    key_path: Path,
    sync: bool,
    keep: bool,
    is_listing: bool,
    end: str | None,
) -> None:
    """Work in a pod of your own over SSH.

    Starts a pod, waits for it, and runs COMMAND, or a shell, in /workspace. The pod is ended
    afterwards, also after an error or Ctrl-C; where that fails you are told its name. Our own
    options stand before COMMAND.
    """
    from openweights.cluster.launch import open_runpod
    from openweights.cluster.pods import development

    runpod = open_runpod(ClusterSettings.from_env())
    if is_listing:
        _list(runpod)
        return
    if end is not None:
        if not development.end(runpod, end):
            raise NotFoundError(f"there is no pod {end}; `ow ssh --ls` lists those that run")
        click.echo(f"ended {end}")
        return
    key = key_path.expanduser()
    wish = development.Wish(f"{count}x {gpu}", cloud_type, image, _public_key(key))
    if told := images.to_be_built(image):
        note(told)
    known_hosts = Settings.from_env().home / "known_hosts"
    known_hosts.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(_work_in_pod(runpod, wish, key, known_hosts, command, sync=sync, keep=keep))


def _list(runpod: RunPod) -> None:
    from openweights.cluster.pods import development

    for pod in development.list_pods(runpod):
        click.echo(f"{pod.name}  {pod.status}  {_price(pod)}")


def _price(pod: Pod) -> str:
    return "an unknown price" if pod.usd_per_hour is None else f"${pod.usd_per_hour:.2f}/h"


def _work_in_pod(
    runpod: RunPod,
    wish: Wish,
    key: Path,
    known_hosts: Path,
    command: Sequence[str],
    *,
    sync: bool,
    keep: bool,
) -> int:
    """Start it, use it, and end it whatever happened in between; the exit code of the command."""
    from openweights.cluster.pods import development
    from openweights.cluster.pods.base import NoCapacity, PodRefused, SpendingLimit

    request = development.request_of(wish)
    is_there, is_answered = True, False
    is_kept = False
    _heed_signals()
    try:
        pod = runpod.start(request)
        is_answered = True
        note(f"started {request.name}: {wish.hardware} on {wish.cloud}, {_price(pod)}")
        target = _reach(runpod, pod, key, known_hosts)
        if sync:
            _copy_folder(target)
        is_kept = keep
        return _run(target, command)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (NoCapacity, PodRefused, SpendingLimit):
        is_there = is_answered
        raise
    finally:
        if is_kept:
            note(f"{request.name} goes on, and costs; `ow ssh --end {request.name}` ends it")
        elif is_there:
            _end(runpod, request.name, may_appear=not is_answered)


def _heed_signals() -> None:
    """A terminal that is closed ends the pod, too, as Ctrl-C does."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, signal.default_int_handler)


def _end(runpod: RunPod, name: str, *, may_appear: bool) -> None:
    from openweights.cluster.pods import development

    try:
        development.end(runpod, name, may_appear=may_appear)
    except (OpenWeightsError, KeyboardInterrupt) as error:
        note(
            f"POD {name} MAY STILL RUN, AND COST ({error}); `ow ssh --end {name}` tries again, "
            "and RunPod's page Pods shows it"
        )
        raise SystemExit(1) from error
    note(f"ended {name}")


def _reach(runpod: RunPod, pod: Pod, key: Path, known_hosts: Path) -> Target:
    """Wait for the pod, and then for its SSH server, which comes up a little later."""
    from openweights.cluster.pods import development

    host, port = development.wait_for_address(runpod, pod)
    target = Target(host, port, key, known_hosts)
    last = "no answer"
    for _ in range(CONNECT_TRIES):
        answer = subprocess.run(
            target.command("true", interactive=False), capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            return target
        last = (answer.stderr.strip().splitlines() or [last])[-1]
        time.sleep(CONNECT_PAUSE_S)
    raise PlatformError(f"no login on {host}:{port}: {last}")


def _run(target: Target, command: Sequence[str]) -> int:
    """One word is a shell line, as typed in quotes; several are a program and its arguments."""
    line = command[0] if len(command) == 1 else shlex.join(command)
    there = f"mkdir -p {WORK} && cd {WORK} && {{ {line or 'exec $SHELL -l'}\n}}"
    interactive = sys.stdin.isatty()
    return subprocess.run(target.command(there, interactive=interactive), check=False).returncode


def _copy_folder(target: Target) -> None:
    """The files that `ow exec` would take along, through one connection."""
    from openweights.client.exec_files import collect_files

    files = collect_files(Path.cwd())
    note(f"copying {len(files)} files to {WORK}")
    remote = f"mkdir -p {WORK} && tar -xf - -C {WORK}"
    receiver = subprocess.Popen(
        target.command(remote, interactive=False), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert receiver.stdin is not None
    with receiver.stdin, tarfile.open(fileobj=receiver.stdin, mode="w|") as tar:
        for name, path in files.items():
            tar.add(path, arcname=name, recursive=False)
    if receiver.wait() != 0:
        raise PlatformError("the files could not be copied")


def _public_key(key: Path) -> str:
    public = key.with_name(f"{key.name}.pub")
    if shutil.which("ssh") is None:
        raise ConfigurationError("the program ssh is not installed")
    try:
        text = public.read_text(encoding="utf-8").strip()
    except OSError:
        raise ConfigurationError(
            f"there is no {public}; make a key with `ssh-keygen -t ed25519 -f {key}`, or name "
            "another with --key-path"
        ) from None
    if "PRIVATE" in text or len(text.splitlines()) != 1:
        raise ConfigurationError(f"{public} holds no public key")
    return text
