"""A deployed model: a server for as long as somebody uses it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from openweights.client.serving.openai_clients import Clients
from openweights.client.watching.waiting import failure
from openweights.errors import InvalidStateError, OpenWeightsError, WaitTimeoutError
from openweights.events import Served
from openweights.types import ENDED, JobRecord

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from openweights.client import OpenWeights
    from openweights.client.jobs import Job

logger = logging.getLogger(__name__)

POLL_S = 0.25
RENEW_S = 60.0
TELL_AFTER_S = 15.0
UP_TIMEOUT_S = 3600.0


class TemporaryApi:
    """A deployment. `with ow.api.deploy(model) as client:` asks it with OpenAI's own client.

    While it is up, a thread renews it every minute, so that it does not end while its owner thinks.

    Args:
        timeout: Seconds after which it ends at the latest, from when it was deployed, or deployed
            again by `up`; None for no such end.

    Attributes:
        job_id: The job that serves it.
        base_url, api_key, pod_id, models: Where and how it is reached, once it is up; `pod_id` is
            None on this machine.
        sem: As many permits as it has rows, for those who send many requests at once.
    """

    def __init__(self, ow: OpenWeights, job_id: str, timeout: float | None = None) -> None:
        self._ow = ow
        self._timeout = timeout
        self.job_id = job_id
        self.base_url: str | None = None
        self.api_key: str | None = None
        self.pod_id: str | None = None
        self.models: tuple[str, ...] = ()
        self.sem = asyncio.Semaphore(16)
        self._clients: Clients | None = None
        self._renewer: threading.Thread | None = None
        self._end_renewing = threading.Event()
        self._downs = 0
        self._coming_up = threading.Lock()
        self._changing = threading.Lock()

    @property
    def sync_client(self) -> OpenAI:
        """OpenAI's client of it.

        Raises:
            InvalidStateError: It is not up.
        """
        return self.clients.sync

    @property
    def async_client(self) -> AsyncOpenAI:
        """OpenAI's asynchronous client of it, for the running event loop; raises as
        `sync_client`.
        """
        return self.clients.asynchronous

    def up(self, timeout: float = UP_TIMEOUT_S) -> OpenAI:
        """Wait until it answers. One that has ended is deployed again.

        Args:
            timeout: Seconds.

        Raises:
            InvalidStateError: `down` was called meanwhile.
            JobFailedError: The model cannot be served; the message has the end of the job's log.
            WaitTimeoutError: `timeout` passed first; it goes on.
        """
        downs = self._downs
        return self.come_up(timeout, lambda: self._downs == downs)

    async def async_up(self, timeout: float = UP_TIMEOUT_S) -> AsyncOpenAI:
        """As `up`, without blocking the event loop."""
        downs, is_awaited = self._downs, True
        try:
            await asyncio.to_thread(
                self.come_up, timeout, lambda: is_awaited and self._downs == downs
            )
        finally:
            # When this is canceled its thread would wait on, and the program for its thread.
            is_awaited = False
        return self.async_client

    def come_up(self, timeout: float, is_wanted: Callable[[], bool]) -> OpenAI:
        """As `up`, for as long as somebody wants it.

        Raises:
            InvalidStateError: Nobody wants it any more; nothing was started since then.
        """
        deadline = time.monotonic() + timeout
        with self._coming_up:
            if self._clients is None:
                was_there = self._start(is_wanted)
                served, clients = self._wait_served(deadline, is_wanted, may_restart=was_there)
                self._use(served, clients, is_wanted)
            return self.sync_client

    def down(self) -> None:
        """End it. When this returns none of its threads is left; its pod or process goes, too."""
        self.forget()
        with self._changing:
            job = self._ow.jobs.retrieve(self.job_id)
            if job.status not in ENDED:
                with contextlib.suppress(InvalidStateError):  # it has just ended by itself
                    job.cancel()

    def __enter__(self) -> OpenAI:
        return self.up()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    async def __aenter__(self) -> AsyncOpenAI:
        return await self.async_up()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.down)

    def __repr__(self) -> str:
        return f"TemporaryApi({self.job_id}, {self.base_url or 'not up'})"

    # ---- coming up -------------------------------------------------------------------------------

    def _start(self, is_wanted: Callable[[], bool]) -> bool:
        """Deploy it again if it has ended; says whether somebody's is there already."""
        job = self._ow.jobs.retrieve(self.job_id)
        if job.status in ENDED:
            self._restart(job, is_wanted)
        params = job.params["validated_params"]
        self.api_key = params["api_key"]
        self.sem = asyncio.Semaphore(params["max_num_seqs"])
        return job.status == "in_progress"

    def _restart(self, job: Job, is_wanted: Callable[[], bool]) -> None:
        # Together, so that none is restarted after `down` has looked what there is to cancel.
        with self._changing:
            self._check_wanted(is_wanted)
            # Before it is queued: the moment that it once was to end at may have passed.
            job.set_timeout(self._timeout).restart()

    def _check_wanted(self, is_wanted: Callable[[], bool]) -> None:
        if not is_wanted():
            raise InvalidStateError(
                f"deployment {self.job_id} was ended before it was up; deploy it again"
            )

    def _wait_served(
        self, deadline: float, is_wanted: Callable[[], bool], *, may_restart: bool
    ) -> tuple[Served, Clients]:
        """Where it is served, once it answers there.

        Args:
            may_restart: Once more, should the one that is there turn out to be lost.
        """
        tell_at = time.monotonic() + TELL_AFTER_S
        while True:
            self._check_wanted(is_wanted)
            # Read before the events: those of a job that has ended are then complete.
            job = self._ow.backend.get_job(self.job_id)
            served = self._served(job)
            if served is not None:
                clients = Clients(served.base_url, self.api_key)
                if clients.is_answered():
                    return served, clients
            if job.status in ENDED and not may_restart:
                raise failure(self._ow, job)
            if job.status in ENDED:
                self._restart(self._ow.jobs.retrieve(self.job_id), is_wanted)
                may_restart = False
            now = time.monotonic()
            if now > deadline:
                raise WaitTimeoutError(
                    f"deployment {self.job_id} is {job.status.replace('_', ' ')} and not up yet; "
                    "it goes on, call up() again for more"
                )
            if now > tell_at:
                tell_at = float("inf")
                where = "waits for a worker" if job.status == "pending" else "loads its model"
                logger.warning("deployment %s %s; `ow logs %s`", job.id, where, job.id)
            time.sleep(POLL_S)
            self._ow.ensure_worker()

    def _served(self, job: JobRecord) -> Served | None:
        if job.status != "in_progress":
            return None
        runs = self._ow.backend.list_runs(job_id=job.id, limit=1)
        events = self._ow.events.list(run_id=runs[-1].id, type=Served.type) if runs else []
        return Served.of(events[-1].data) if events else None

    def _use(self, served: Served, clients: Clients, is_wanted: Callable[[], bool]) -> None:
        with self._changing:
            self._check_wanted(is_wanted)
            self._clients = clients
            self.base_url, self.pod_id = served.base_url, served.pod_id
            self.models = tuple(served.models)
            self._end_renewing = threading.Event()
            self._renewer = threading.Thread(
                target=self._renew, args=(self._end_renewing,), name=self.job_id, daemon=True
            )
            self._renewer.start()

    # ---- being up --------------------------------------------------------------------------------

    @property
    def clients(self) -> Clients:
        """Both clients of it; raises as `sync_client`."""
        if self._clients is None:
            raise InvalidStateError(f"deployment {self.job_id} is not up: call up() first")
        return self._clients

    def _renew(self, end: threading.Event) -> None:
        while not end.wait(RENEW_S):
            clients = self._clients
            if clients is not None and not clients.is_answered():
                logger.warning("deployment %s does not answer: %s", self.job_id, self.state())

    def state(self) -> str:
        """How its job stands, and why it ended if it did, in one line."""
        try:
            job = self._ow.backend.get_job(self.job_id)
            runs = self._ow.backend.list_runs(job_id=self.job_id, limit=1)
        except OpenWeightsError as error:
            return str(error)
        words = f"its job {job.id} is {job.status.replace('_', ' ')}"
        return f"{words}: {runs[-1].error}" if runs and runs[-1].error else words

    def forget(self) -> None:
        """Use it no more, without ending it: it ends by itself when nobody else uses it."""
        with self._changing:
            self._downs += 1
            self._end_renewing.set()
            renewer, self._renewer = self._renewer, None
            clients, self._clients = self._clients, None
            self.base_url = None
        if renewer is not None and renewer is not threading.current_thread():
            renewer.join()
        if clients is not None:
            clients.close()
