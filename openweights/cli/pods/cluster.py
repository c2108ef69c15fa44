"""`ow cluster`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from openweights import images
from openweights.cli.output import env_file_option, note
from openweights.errors import ConfigurationError
from openweights.settings import ClusterSettings, Settings

if TYPE_CHECKING:
    from openweights.cluster.launch import ProviderName
    from openweights.cluster.planning.actions import Action


SHOWN_OFFERS = 5


@click.command()
@click.option(
    "--provider",
    type=click.Choice(["runpod", "local"]),
    default="runpod",
    show_default=True,
    help="Where workers run: RunPod pods, or processes on this machine.",
)
@env_file_option
@click.option("--dry-run", is_flag=True, help="Print what would be done now, and do nothing.")
@click.option(
    "--jobs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --dry-run: for these jobs, a line of JSON for each, as `create` takes them.",
)
@click.option("--all", "is_for_all", is_flag=True, help="Run all that `ow manage start` has named.")
def cluster(provider: ProviderName, dry_run: bool, jobs: Path | None, is_for_all: bool) -> None:
    """Run the manager that starts pods.

    It starts them for waiting jobs and ends those with nothing to do, for the organization of
    OPENWEIGHTS_API_KEY, an admin's key, with at most MAX_WORKERS pods (8), until Ctrl-C or SIGTERM.
    Pods go on then, and the next manager takes them over.
    OPENWEIGHTS_POD_ENV names variables, with commas between, that every pod gets, such as HF_TOKEN.
    OPENWEIGHTS_SECRETS_KEY, with which pods open what `ow env` keeps, is passed on where it is set.
    --dry-run --jobs FILE needs no keys: it says what pods these jobs would get, and at what price.
    """
    if jobs is not None:
        if not dry_run or is_for_all:
            raise click.UsageError("--jobs goes with --dry-run alone")
        _preview(jobs)
        return
    if is_for_all:
        if dry_run:
            raise click.UsageError("--dry-run is for one organization; leave out --all")
        _supervise(provider)
        return
    from openweights.cluster.launch import open_manager, sole_manager

    settings, cluster_settings = Settings.from_env(), ClusterSettings.from_env()
    _set_up_logging(logging.WARNING if dry_run else logging.INFO)
    if dry_run:
        _say_what_would_be_done(settings, cluster_settings, provider)
        return
    with (
        open_manager(settings, cluster_settings, provider) as manager,
        sole_manager(settings, manager.organization_id),
    ):
        note(
            f"managing organization {manager.organization_id} on {provider}, "
            f"{cluster_settings.max_workers} workers at most; Ctrl-C ends it"
        )
        manager.run(_stop_on_signals())


def _say_what_would_be_done(
    settings: Settings, cluster_settings: ClusterSettings, provider: ProviderName
) -> None:
    from openweights.cluster.launch import open_manager

    try:
        with open_manager(settings, cluster_settings, provider) as manager:
            actions = manager.plan(manager.observe())
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error}. Without keys, `ow cluster --dry-run --jobs FILE` says what pods the jobs of "
            "a file would get, and at what price"
        ) from None
    for action in actions:
        click.echo(describe(action))
    _say_what_to_build(actions)
    if not actions:
        note("nothing is to be done")


def _say_what_to_build(planned: Sequence[Action]) -> None:
    from openweights.cluster.planning.actions import StartWorker

    wanted = dict.fromkeys(a.image for a in planned if isinstance(a, StartWorker))
    for told in filter(None, map(images.to_be_built, wanted)):
        note(told)


def _preview(jobs: Path) -> None:
    from openweights.cli.pods.preview import preview

    lines, actions = preview(jobs, ClusterSettings.from_env())
    for line in (*lines, *map(describe, actions)):
        click.echo(line)
    _say_what_to_build(actions)


def describe(action: Action) -> str:
    """What the manager would do, on one line."""
    from openweights.cluster.planning import actions

    match action:
        case actions.StartWorker():
            offers = [f"{o.hardware_type} {o.cloud} ${o.usd_per_hour:.2f}/h" for o in action.offers]
            more = len(offers) - SHOWN_OFFERS
            shown = ", ".join(offers[:SHOWN_OFFERS]) + (f" and {more} more" if more > 0 else "")
            return f"start a worker of {action.image} for {action.job_id}: the first of {shown}"
        case actions.AdoptPod():
            return f"record that pod {action.pod_id} is worker {action.worker_id}"
        case actions.StopWorker():
            return f"ask worker {action.worker_id} to end: {action.reason}"
        case actions.EndWorker():
            return f"take worker {action.worker_id} for ended: {action.reason}"
        case actions.TerminatePod():
            return f"end pod {action.pod_id} of worker {action.worker_id}: {action.reason}"
        case actions.ReportPod():
            return f"leave pod {action.pod_id} ({action.name}) alone: it is not ours"
        case actions.ReportJobs():
            jobs = ", ".join(action.job_ids)
            return f"nothing for {jobs}: {action.reason}"


def _supervise(provider: ProviderName) -> None:
    from openweights.cluster.supervisor import Supervisor

    _set_up_logging(logging.INFO)
    command = [sys.executable, "-m", "openweights.cli", "cluster", "--provider", provider]
    folder = Settings.from_env().home / "managed"
    Supervisor(folder, command, ClusterSettings.from_env().machine_env).run(_stop_on_signals())


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def ask(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ask)
    return stop


def _set_up_logging(level: int) -> None:
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    # A line for every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
