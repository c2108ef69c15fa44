"""`ow exec`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from openweights.cli.jobs.logs import print_chunks
from openweights.cli.output import (
    INTERRUPTED,
    json_option,
    note,
    one_line,
    print_json,
    print_table,
)
from openweights.client.watching.waiting import why_failed
from openweights.types import CLOUD_TYPES, CloudType

if TYPE_CHECKING:
    from openweights.client.jobs import Job
    from openweights.client.watching.plan import Plan


class ShellCommand(click.Command):
    """Takes our options after COMMAND only where that is a quoted line: `ow exec "a | b" --wait`.

    In `ow exec python train.py --json` the option is the script's. An option before COMMAND that
    is none of ours is refused.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = False
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        words: object = values.get("command")
        # Neither an empty tuple nor click's mark for "not given" has a first word.
        ctx.allow_interspersed_args = isinstance(words, tuple) and any(
            _is_line(str(word)) for word in cast("tuple[object, ...]", words)[:1]
        )
        return super().parse_args(ctx, args)


def _is_line(word: str) -> bool:
    return len(word.split()) > 1


@click.command("exec", cls=ShellCommand)
@click.argument("command", nargs=-1, required=True)
@click.option(
    "--cloud-type",
    type=click.Choice(CLOUD_TYPES, case_sensitive=False),
    default="SECURE",
    show_default=True,
    help="Tier of the RunPod pods that may run it; on this machine it changes nothing.",
)
@click.option(
    "--requires-vram-gb",
    type=click.IntRange(min=0),
    default=24,
    show_default=True,
    metavar="N",
    help="GPU memory needed in all.",
)
@click.option(
    "--allowed-hardware",
    multiple=True,
    metavar="HARDWARE",
    help="Such as '2x H100S'; may be given several times. Without it, any that has the memory.",
)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="NAME",
    help="A secret that the command gets as a variable; may be given several times.",
)
@click.option(
    "--after",
    multiple=True,
    metavar="JOB",
    help="A job that must complete first; may be given several times.",
)
@click.option("--yes", is_flag=True, help="Take this folder even if it is a home folder, or /.")
@click.option("--dry-run", is_flag=True, help="Only list the files that would be sent.")
@click.option("--plan", is_flag=True, help="Only say what it would cost, and when it would run.")
@click.option("--wait", is_flag=True, help="Print the log as it comes; exit with the job's code.")
@json_option
def exec_command(
    command: tuple[str, ...],
    cloud_type: CloudType,
    requires_vram_gb: int,
    allowed_hardware: tuple[str, ...],
    secrets: tuple[str, ...],
    after: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    plan: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Run a command with this folder as a job.

    The files of the current folder travel with it, except what .gitignore names, .git, secrets
    (such as .env files and keys) and virtual environments; --dry-run lists them. COMMAND is either
    one quoted shell line, or a program and its arguments, with our own options before it.
    """
    from openweights.client import OpenWeights

    if wait and as_json:
        raise click.UsageError("--wait prints the log, --json the job: use one of them")
    ow = OpenWeights()
    kind = ow.exec
    kind.even_home = yes
    if dry_run:
        _list_files(kind.mounted_paths())
        return
    options: dict[str, Any] = {
        "command": _shell_line(command),
        "cloud_type": cloud_type,
        "requires_vram_gb": requires_vram_gb,
        "allowed_hardware": list(allowed_hardware) or None,
        "secrets": secrets,
        "after": [ow.jobs.retrieve(job) for job in after],
    }
    if plan:
        _print_plan(kind.plan(**options), as_json=as_json)
        return
    job = kind.create(**options)
    if not wait:
        if as_json:
            print_json(job.record)
        else:
            click.echo(job.id)
        return
    sys.exit(_follow(job))


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    for line in plan.words():
        click.echo(one_line(line))


def _list_files(files: Mapping[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    print_table(["bytes", "file"], [[str(size), one_line(name)] for name, size in sizes.items()])
    note(f"{len(sizes)} files, {sum(sizes.values())} bytes")


def _follow(job: Job) -> int:
    """Print the job's log until it ends; the exit code of the job."""
    note(f"job {job.id}" + (" has run before; its log:" if job.status == "completed" else ""))
    try:
        print_chunks(job.logs(follow=True))
    except KeyboardInterrupt:
        note(
            f"stopped waiting; job {job.id} goes on: `ow logs -f {job.id}` follows it, "
            f"`ow cancel {job.id}` ends it"
        )
        return INTERRUPTED
    job.refresh()
    if job.status == "completed":
        return 0
    has_run = job.status == "failed" and job.failed_by is None and job.runs
    last = job.runs[-1].record if has_run else None
    error = why_failed(job.record, None if last is None else last.error)
    note(f"job {job.id} {job.status}" + (f": {one_line(error)}" if error else ""))
    return shell_code(None if last is None else last.exit_code)


def shell_code(exit_code: int | None) -> int:
    """The code that a shell would exit with after a failed run; 1 where it has none."""
    if exit_code is not None and exit_code < 0:
        return 128 - exit_code
    return min(exit_code or 1, 255)


def _shell_line(words: tuple[str, ...]) -> str:
    if len(words) == 1:
        return words[0]
    if _is_line(words[0]):
        raise click.UsageError(
            "COMMAND is one quoted line or separate words, not both: "
            f"{words[0]!r} is followed by {words[1]!r}"
        )
    return shlex.join(words)
