"""The command `ow`: a group whose commands are imported when they are used.

`ow --help` must cost next to nothing, so the one-line helps stand in `COMMANDS` beside the place of
each command, and nothing here imports pydantic, rich or torch. A test compares the table with the
commands' own helps.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from io import TextIOWrapper
from typing import Any, cast

import click

from openweights import __version__
from openweights.cli.output import error_boundary

# name -> (where below this package the command is, its one-line help), as they are listed
COMMANDS: dict[str, tuple[str, str]] = {
    "ls": ("jobs.ls:ls", "List jobs, the last changed first."),
    "show": ("jobs.show:show", "Show all about one job."),
    "logs": ("jobs.logs:logs", "Print the log of a job."),
    "events": ("jobs.events:events", "Print what a job has logged."),
    "top": ("jobs.top:top", "Show what runs, what waits and what ended last, until Ctrl-C."),
    "compare": ("jobs.compare:compare", "Compare jobs: what differs, and where they ended."),
    "plot": ("jobs.compare:plot", "Draw what jobs have measured."),
    "fetch": ("jobs.fetch:fetch", "Fetch a file, or a job's results."),
    "exec": ("jobs.exec:exec_command", "Run a command with this folder as a job."),
    "cancel": ("jobs.change:cancel", "Cancel jobs."),
    "restart": ("jobs.change:restart", "Restart failed or canceled jobs."),
    "fields": ("jobs.fields:fields", "List the fields of fine-tuning jobs, or explain one."),
    "rm": ("jobs.remove:rm", "Delete jobs that have ended, with their runs, events and logs."),
    "gc": ("jobs.remove:gc", "Remove old logs, and old files that nobody needs."),
    "pause": ("jobs.change:pause", "Give out no new jobs until `ow resume`; what runs goes on."),
    "resume": ("jobs.change:resume", "Give out jobs again."),
    "audit": ("jobs.change:audit", "Show who did what, the last first."),
    "infer": ("models.infer:infer", "Answer a file of prompts with a model, or with several."),
    "sample": ("models.infer:sample", "Show a fine-tuned model's answers, before and after."),
    "eval": ("models.evaluate:evaluate", "Score models on problems, side by side."),
    "chat": ("models.chat:chat", "Talk to a model in the terminal."),
    "serve-model": ("models.chat:serve_model", "Serve models to OpenAI clients."),
    "worker": ("worker:worker", "Run a worker here, in the foreground."),
    "service": ("service:service", "Keep a worker running here, also after a reboot."),
    "serve": ("serve:serve", "Show jobs on a page, and answer OpenAI clients."),
    "demo": ("demo:demo", "Train a small model here, with and without SDFT."),
    "gpus": ("pods.gpus:gpus", "List the GPUs that pods can have, the cheapest first."),
    "cluster": ("pods.cluster:cluster", "Run the manager that starts pods."),
    "manage": ("pods.manage:manage", "Name the organizations that are managed here."),
    "deploy": ("pods.deploy:deploy", "Run the manager in a small pod of its own."),
    "ssh": ("pods.ssh:ssh", "Work in a pod of your own over SSH."),
    "costs": ("project.costs:costs", "Show what pods have cost, in USD."),
    "db": ("project.db:db", "Set up the database of a Supabase project, and check it."),
    "login": ("project.login:login", "Store a project's address and your key here."),
    "logout": ("project.login:logout", "Remove what `ow login` has stored."),
    "whoami": ("project.login:whoami", "Show whose key is in use, and what it may do."),
    "token": ("project.token:token", "Make, list and revoke keys of the organization."),
    "org": ("project.org:org", "Show or rename the organization, and its members."),
    "env": ("project.env:env", "Keep secrets that jobs get as variables."),
    "signup": ("project.db:signup", "Create an organization and its first key."),
    "completion": (
        "completion:completion",
        "Print what makes SHELL complete commands, options and job ids.",
    ),
    "doctor": ("doctor:doctor", "Check this installation."),
    "version": ("doctor:version", "Print the version."),
}


# What people type for them who know other programs.
_CALLED_ELSEWHERE = {
    **{"dashboard": "serve", "ui": "serve", "web": "serve", "page": "serve"},
    **{"list": "ls", "jobs": "ls", "status": "ls", "ps": "ls", "queue": "top", "watch": "top"},
    **{"log": "logs", "tail": "logs", "info": "show", "describe": "show", "download": "fetch"},
    **{"stop": "cancel", "kill": "cancel", "abort": "cancel", "retry": "restart", "delete": "rm"},
    **{
        "run": "exec",
        "evaluate": "eval",
        "generate": "infer",
        "secrets": "env",
        "hardware": "gpus",
    },
    **{"check": "doctor", "price": "gpus", "cost": "costs", "upgrade": "db", "migrate": "db"},
}


class LazyGroup(click.Group):
    """A group that lists its commands from `COMMANDS` and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            known = [*COMMANDS, *_CALLED_ELSEWHERE]
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
            meant = _CALLED_ELSEWHERE.get(near[0], near[0]) if near else None
            remedy = f"Did you mean 'ow {meant}'?" if meant else "'ow --help' lists them."
            ctx.fail(f"No such command {name!r}. {remedy}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # Here, not around main(): further out, click has made its own error of a KeyboardInterrupt.
        with error_boundary():
            from openweights.cli.store import take_up_lost_jobs

            take_up_lost_jobs()
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="openweights %(version)s")
def main() -> None:
    """Fine-tuning jobs, on this machine or with a team.

    A JOB is an id as `ow ls` prints it, or the beginning of one. The records of jobs lie under
    OPENWEIGHTS_HOME (~/.openweights), or in the Supabase project that `ow login` has named.
    """
    # What the terminal's encoding cannot hold is shown escaped instead of being an error.
    stdout: object = sys.stdout
    if isinstance(stdout, TextIOWrapper):
        cast("TextIOWrapper[Any]", stdout).reconfigure(errors="backslashreplace")
