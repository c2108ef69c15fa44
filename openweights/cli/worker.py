"""`ow worker`."""

from __future__ import annotations

import logging
import sys

import click

from openweights.cli.output import env_file_option
from openweights.settings import Settings


@click.command()
@env_file_option
@click.option("--once", is_flag=True, help="Take one job at most, and end.")
def worker(once: bool) -> None:
    """Run a worker here, in the foreground.

    It takes jobs until it is told to end: Ctrl-C, or SIGTERM, lets the current job save and gives
    it back.
    """
    from openweights.worker.main import run_worker

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    sys.exit(run_worker(Settings.from_env(), once=once))
