"""A small process beside the self-started worker, so that a job whose worker was killed is taken up
again although no client is there: `python -m openweights.worker.standby`.

The two look after each other. The worker starts a standby when none holds `standby.lock`; the
standby starts a worker when none holds the worker's lock and a job waits. It goes away when nothing
is left to do, or when the worker was asked to end, which that one notes in its lock file.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.backends.local.worker_locks import WORKER_LOCK, has_lost_its_worker, is_locked
from openweights.client.local_worker import open_log, start_worker, what_waits
from openweights.errors import OpenWeightsError
from openweights.retry import delays
from openweights.settings import Settings
from openweights.worker.shutdown import sole_holder

logger = logging.getLogger(__name__)

STANDBY_LOCK = "standby.lock"
LOOK_S = 1.0
LATER_LOOK_S = 5.0
START_S = 30.0
MOST_STARTS = 20  # without one that stays: what is broken here is not mended by trying


def keep_standby(settings: Settings, ended: threading.Event) -> None:
    """Start a standby whenever there is none, until `ended`; for a thread of the worker."""
    while not ended.is_set():
        if not is_locked(settings.home / STANDBY_LOCK):
            with contextlib.suppress(OSError), open_log(settings) as log:
                subprocess.Popen(
                    [sys.executable, "-m", "openweights.worker.standby"],
                    cwd=settings.home,
                    env=settings.child_env(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            ended.wait(START_S / 10)
        ended.wait(LOOK_S)


def watch(settings: Settings, backend: Backend) -> None:
    """Start a worker whenever a job waits and there is none; return when there is nothing to do."""
    lock = settings.home / WORKER_LOCK
    pauses = delays(longest_s=60.0)
    starts = 0
    while starts < MOST_STARTS:
        time.sleep(LOOK_S)
        if is_locked(lock):
            starts, pauses = 0, delays(longest_s=60.0)
            continue
        if not has_lost_its_worker(settings.home):
            return
        waiting = _waiting(backend)
        if waiting == "none":
            return
        if waiting == "later":
            time.sleep(LATER_LOOK_S)
            continue
        logger.info("a job waits and no worker is there: starting one")
        process = start_worker(settings)
        starts += 1
        _wait_for_lock(lock, process)
        time.sleep(next(pauses))


def _waiting(backend: Backend) -> Literal["now", "later", "none"]:
    """`what_waits`; where the store cannot be read, a worker is to find out."""
    try:
        return what_waits(backend)
    except OpenWeightsError as error:
        logger.warning("the store cannot be read: %s", error)
        return "now"


def _wait_for_lock(lock: Path, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + START_S
    while not is_locked(lock) and process.poll() is None and time.monotonic() < give_up_at:
        time.sleep(LOOK_S / 10)


def main() -> int:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = Settings.from_env()
    with sole_holder(settings.home / STANDBY_LOCK) as lock:
        if lock is None:
            return 0
        with contextlib.closing(open_backend(settings)) as backend:
            watch(settings, backend)
    return 0


if __name__ == "__main__":
    sys.exit(main())
