"""The worker's loop: register, claim, execute, and go away when asked to or when there is nothing
to do.

Run it with `python -m openweights.worker.main [--embedded | --serving | --answering | --while-held]
[--once]`. An embedded worker is the one that a client starts by itself on this machine: there is
one per store, and it goes away when idle. Deployed models have serving workers beside it, one each,
and questions have an answering one while it is busy. One that is held ends with its client.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from openweights import hardware
from openweights.backends import open_backend
from openweights.backends.base import Backend
from openweights.backends.local.worker_locks import ASKED_TO_END, WORKER_LOCK
from openweights.client.watching.queue import (
    gpu_gb,
    is_answered_apart,
    is_first_answered_beside,
)
from openweights.errors import (
    ConfigurationError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    StoreUnavailableError,
)
from openweights.retry import backoff_s
from openweights.settings import Settings
from openweights.types import (
    ANSWERING_PREFIX,
    SERVING_PREFIX,
    Claim,
    JobRecord,
    Lane,
    WorkerSpec,
)
from openweights.worker import gpu_health
from openweights.worker.execution import Host, execute, runs_folder
from openweights.worker.folder import sweep
from openweights.worker.gpu_reclaim import reclaim
from openweights.worker.heartbeat import Heartbeat
from openweights.worker.job_secrets import drop_handed_over
from openweights.worker.shutdown import Shutdown, persist, sole_holder
from openweights.worker.standby import keep_standby

logger = logging.getLogger(__name__)

LONGEST_POLL_S = 5.0
LONGEST_PAUSE_S = 30.0
MOST_REFUSALS = 3  # a project may refuse a good key for a moment, while it is changed
REFUSAL_PAUSE_S = 2.0
DAY_S = 86_400.0
_PREFIXES: dict[Lane | None, str] = {"servers": SERVING_PREFIX, "questions": ANSWERING_PREFIX}


def run_worker(
    settings: Settings,
    *,
    lane: Lane | None = None,
    once: bool = False,
    held_by: int | None = None,
) -> int:
    """Work until told to end; returns the exit code.

    Args:
        lane: What a worker takes that was started by itself. Of those for "jobs" there is one per
            store, else 0 at once; of those for "servers" as many as there are such models. They,
            and a worker in a pod, which would be paid for when no manager is there to end it, end
            after `settings.worker_idle_s` without work.
        once: Take one job, if there is one, and end.
        held_by: A pipe, read from: the worker ends with who has its other end.

    Raises:
        ConfigurationError: The settings or this machine do not allow a worker.
    """
    shutdown = Shutdown(settings.cancel_grace_s, settings.pod.notice_s)
    if held_by is not None:
        shutdown.follow(held_by)
    embedded = lane == "jobs"
    found = _detect(settings, is_self_started=lane is not None)
    is_by_hand = lane is None and settings.pod.worker_id is None
    idle_s = None if is_by_hand else settings.worker_idle_s
    settings = settings if lane is None else replace(settings, lane=lane)
    with contextlib.closing(open_backend(settings)) as backend, shutdown.on_signals():
        while True:
            path = settings.home / WORKER_LOCK
            with sole_holder(path) if embedded else contextlib.nullcontext() as lock:
                if embedded and lock is None:
                    return 0
                worker = Worker(settings, backend, found, shutdown)
                with _standby(settings, is_wanted=embedded and not once):
                    exit_code = worker.run(once=once, idle_s=idle_s)
                if lock is not None and worker.was_asked_to_end:
                    lock.write(ASKED_TO_END)
                    lock.flush()
            if exit_code or not embedded or once or shutdown.requested.is_set():
                return exit_code
            # A client that saw this worker alive a moment ago has started none. Now that the next
            # client would start one, look once more.
            if not backend.place_in_queue().ahead.ending:
                return 0


class Worker:
    """One registration: from `active` to `terminated`."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        found: hardware.Hardware,
        shutdown: Shutdown,
    ) -> None:
        self.id = settings.pod.worker_id or new_worker_id(settings.lane)
        self._pod = settings.pod
        self._backend = backend
        self._shutdown = shutdown
        self.was_asked_to_end = False
        self._heartbeat = Heartbeat(backend, self.id, backend.heartbeat_s, self._end_on_request)
        self._runs = runs_folder(settings)
        self._host = Host(
            backend,
            settings,
            settings.child_env(),
            self._runs,
            found,
            shutdown,
            self._heartbeat,
        )
        self._last_run: int | None = None
        self._keep_days = settings.keep_days
        self._collects_at = -math.inf

    def run(self, *, once: bool, idle_s: float | None) -> int:
        """Register, work, and sign off whatever happens; returns the exit code."""
        found = self._host.hardware
        spec = WorkerSpec(
            self.id,
            docker_image=self._pod.docker_image or "",
            hardware_type=found.hardware_type,
            gpu_count=found.gpu_count,
            vram_gb=found.vram_gb,
            cloud_type=self._pod.cloud_type,
            pod_id=self._pod.pod_id,
        )
        try:
            persist(lambda: self._backend.register_worker(spec), give_up=self._shutdown.requested)
            logger.info("%s: %s, %s GB", self.id, found.hardware_type, found.vram_gb)
            with self._heartbeat:
                self._work(once=once, idle_s=idle_s)
        except PlatformError as error:
            logger.error("%s ends: %s", self.id, error)
            return 0 if self._shutdown.requested.is_set() else 1
        finally:
            self._sign_off()
        return 0

    def _end_on_request(self) -> None:
        """The store says so: nobody shall take this worker's place."""
        self.was_asked_to_end = True
        self._shutdown.request()

    def _work(self, *, once: bool, idle_s: float | None) -> None:
        if (problem := self._gpu_problem()) is not None:
            # Before it holds a job, so that the manager counts it as a worker that never came up.
            raise PlatformError(f"its GPU is not fit for work: {problem}")
        idle_since = started_at = time.monotonic()
        failures = 0
        refusals = 0
        while not self._shutdown.requested.is_set():
            if self._pod.ttl_hours and time.monotonic() - started_at > self._pod.ttl_hours * 3600:
                # A pod that nobody ends must not be paid for for ever; a job is not cut short.
                logger.info("%s: its time to live is over", self.id)
                return
            try:
                has_worked = self._step()
                failures, refusals = 0, 0
            except PlatformError:
                raise
            except ConfigurationError as error:
                refusals += 1
                self._bear(error, refusals)
                continue
            except Exception:  # noqa: BLE001 - the loop of a daemon: no job may end it
                logger.exception("%s: the loop goes on after an error", self.id)
                failures += 1
                self._shutdown.requested.wait(backoff_s(failures, 1.0, LONGEST_PAUSE_S))
                continue
            if once:
                return
            if has_worked:
                idle_since = time.monotonic()
                continue
            if idle_s is not None and time.monotonic() - idle_since >= idle_s:
                logger.info("%s: idle for %.0f s", self.id, idle_s)
                return
            self._shutdown.requested.wait(min(self._backend.heartbeat_s / 4, LONGEST_POLL_S))

    def _bear(self, error: ConfigurationError, count: int) -> None:
        """A store that refuses for good, such as one of a newer version, is for another worker."""
        logger.error("%s: %s", self.id, error)
        if count == MOST_REFUSALS:
            raise PlatformError(f"the store refuses this worker: {error}") from error
        self._shutdown.requested.wait(REFUSAL_PAUSE_S)

    def _step(self) -> bool:
        """Take and execute a job; False if there is none."""
        claim = self._claim()
        # After the claim: what is left of the job's lost run must not meet the new one.
        sweep(self._runs)
        if claim is None:
            self._collect_garbage()
            if self._backend.team is None:
                drop_handed_over(self._backend, self._host.settings.home)
            return False
        if claim.run.id == self._last_run:
            # Signing off is what gives it back; executing it again would be a second execution of
            # one run.
            raise PlatformError(f"the store did not take the end of run {claim.run.id}")
        self._last_run = claim.run.id
        if (problem := self._gpu_problem()) is not None:
            self._hand_back(claim, problem)
        else:
            execute(claim, self._host)
        return True

    def _collect_garbage(self) -> None:
        """Once a day, where the store is this machine's; a project's manager does it there."""
        now = time.monotonic()
        if self._keep_days is None or self._backend.team is not None or now < self._collects_at:
            return
        self._collects_at = now + DAY_S
        found = self._backend.collect_garbage(self._keep_days * DAY_S)
        if found.files or found.logs:
            logger.info("removed %s old files and %s old logs", found.files, found.logs)

    def _gpu_problem(self) -> str | None:
        """Why this machine should take no job; always None where the machine is somebody's own."""
        if self._pod.worker_id is None:
            return None
        env = self._host.env
        return reclaim(env) or gpu_health.problem(env)

    def _hand_back(self, claim: Claim, problem: str) -> None:
        logger.error("%s ends, its GPU is not fit for work: %s", self.id, problem)
        reason = f"the GPU of {self.id} was not fit for work, not counted: {problem}"
        persist(
            lambda: self._backend.release_run(claim.run.id, claim.run.attempt, reason=reason),
            give_up=self._shutdown.requested,
        )
        self._shutdown.request()

    def _may_claim(self) -> bool:
        """Whether what its lane takes may begin now, beside what runs on this machine: a question
        that has room, and, on a GPU, no other job while a question is answered there.
        """
        lane = self._host.settings.lane
        if lane == "questions":
            ahead = self._backend.place_in_queue().ahead
            there_gb = gpu_gb(self._backend.list_workers(statuses=["active"]))
            return is_first_answered_beside(ahead, self._running(), there_gb)
        if lane == "jobs" and self._host.hardware.gpu_count:
            return not any(is_answered_apart(job) for job in self._running())
        return True

    def _running(self) -> list[JobRecord]:
        return self._backend.list_jobs(statuses=["in_progress"], limit=None)

    def _claim(self) -> Claim | None:
        if not self._may_claim():
            return None
        try:
            return persist(
                lambda: self._backend.claim_job(self.id), give_up=self._shutdown.requested
            )
        except StoreUnavailableError:
            return None
        except NotFoundError as error:
            raise PlatformError(f"the store does not know this worker any more: {error}") from error

    def _sign_off(self) -> None:
        # Once, without patience: a store that is away finds out by itself that this worker is gone.
        try:
            self._backend.set_worker_status(self.id, "terminated")
        except ConfigurationError:
            return  # it refuses everything, which the worker has told by now
        except OpenWeightsError as error:
            logger.warning("%s: could not sign off: %s", self.id, error)


def _detect(settings: Settings, *, is_self_started: bool) -> hardware.Hardware:
    try:
        return hardware.detect(settings.child_env())
    except ConfigurationError as error:
        if not is_self_started:
            raise
        # Nobody pays for this machine by the hour, and a broken driver is no reason to run nothing.
        logger.warning("%s; going on without a GPU", error)
        return hardware.CPU


def new_worker_id(lane: Lane | None) -> str:
    """An id that nobody has, by which clients see the worker's lane."""
    prefix = _PREFIXES.get(lane, "worker-")
    return f"{prefix}{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def _standby(settings: Settings, *, is_wanted: bool) -> Iterator[None]:
    """Meanwhile somebody takes up what this worker leaves behind when it is killed."""
    ended = threading.Event()
    if is_wanted:
        threading.Thread(target=keep_standby, args=(settings, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m openweights.worker.main", description=__doc__)
    lanes: Any = {"dest": "lane", "action": "store_const"}
    parser.add_argument(
        "--embedded", **lanes, const="jobs", help="one per store; go away when idle"
    )
    parser.add_argument("--serving", **lanes, const="servers", help="for deployed models alone")
    parser.add_argument("--answering", **lanes, const="questions", help="for questions alone")
    parser.add_argument(
        "--once", action="store_true", help="take one job, if there is one, and end"
    )
    parser.add_argument(
        "--while-held",
        action="store_true",
        help="end when standard input does, as with the process that holds it",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    try:
        settings = Settings.from_env()
        held_by = sys.stdin.fileno() if options.while_held else None
        return run_worker(settings, lane=options.lane, once=options.once, held_by=held_by)
    except OpenWeightsError as error:
        logger.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
