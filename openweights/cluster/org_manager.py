"""The cluster manager of one organization: observe, plan, apply, again and again.

What is to be done is decided by `planner.plan`; here it is done. Every action may be cut short by a
crash and is then completed by the next pass: a worker's row is written before its pod is asked for,
the pod is named after it, and it is looked for by that name before it is asked for again. Nothing
of that needs memory of ours. One error, of a job, the store or the provider, never ends the loop.

Pods are read before rows, so that a pod that is seen always has its row seen.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from openweights.cluster.cleanup import Cleanup
from openweights.cluster.planning.actions import (
    Action,
    AdoptPod,
    EndWorker,
    ReportJobs,
    ReportPod,
    StartWorker,
    StopWorker,
    TerminatePod,
)
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import Pod, pod_name, worker_of
from openweights.cluster.planning.planner import Limits, plan
from openweights.cluster.pods.base import (
    NoCapacity,
    OutcomeUnknown,
    PodRefused,
    Pods,
    PodsUnavailable,
    RateLimited,
    SpendingLimit,
    request_of,
    row_of,
)
from openweights.cluster.store import ClusterStore
from openweights.cluster.watch import ReportLog, Seen, Watch
from openweights.errors import ConfigurationError, OpenWeightsError, PlatformError
from openweights.gpu_catalogue import Offer
from openweights.retry import backoff_s

logger = logging.getLogger(__name__)

POLL_S = 15.0
MOST_SKEW_S = 5.0
LONGEST_PAUSE_S = 300.0
# The key outlives the worker's last job; after that nobody needs it.
KEY_DAYS = 7
_SECRET = re.compile(r"\b(ow|hf|sk|rpa?)[_-][A-Za-z0-9_-]{8,}")


class _NotAlone(PlatformError):
    """Another manager starts pods for the same organization."""


class OrganizationManager:
    """Keeps the pods of one organization in step with its jobs.

    Args:
        worker_env: What every worker's process needs to find the store, without any key.
        clock: This machine's; ages are computed by the store's.
        new_id: Makes the ids of workers.
    """

    def __init__(
        self,
        store: ClusterStore,
        pods: Pods,
        *,
        limits: Limits,
        worker_env: Mapping[str, str],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: f"worker-{uuid.uuid4().hex[:12]}",
    ) -> None:
        self._store = store
        self._pods = pods
        self._limits = limits
        self._worker_env = worker_env
        self._clock = clock
        self._new_id = new_id
        self._market = Market()
        self._watch = Watch(self._log_size, pods.name)
        self._cleanup = Cleanup(store)
        self._reports = ReportLog()
        self._foreign: set[str] = set()
        self._proven: set[str] = set()
        self._ended_here: set[str] = set()
        self._made: set[str] = set()
        self._quiet_until: datetime | None = None
        self._ahead = timedelta(0)
        self._kept: Mapping[str, Any] | None = None

    @property
    def organization_id(self) -> str:
        return self._store.organization_id

    # ---- the loop --------------------------------------------------------------------------------

    def run(self, stop: threading.Event, poll_s: float = POLL_S) -> None:
        """Pass after pass until `stop` is set; longer pauses while passes fail."""
        failures = 0
        while not stop.is_set():
            try:
                self.step()
                failures = 0
            except ConfigurationError as error:
                failures += 1
                logger.error("%s", error)
            except OpenWeightsError as error:
                failures += 1
                logger.warning("this pass failed: %s", error)
            except Exception:  # noqa: BLE001 - the loop of a daemon: pods must not be left alone
                failures += 1
                logger.exception("this pass failed")
            stop.wait(backoff_s(failures, poll_s, max(poll_s, LONGEST_PAUSE_S)))

    def step(self) -> None:
        """One pass.

        Raises:
            OpenWeightsError: The store could not be read, or the provider refuses the key. What had
                been done by then stays done.
        """
        try:
            seen = self.observe()
        except OpenWeightsError:
            self._watch.store_was_away()
            raise
        self._recall(seen.now)
        actions = self.plan(seen)
        self._reports.write(a for a in actions if isinstance(a, ReportPod | ReportJobs))
        for action in actions:
            try:
                self._apply(action, seen)
            except RateLimited as error:
                self._be_quiet(error, seen.now)
                break
            except _NotAlone as error:
                logger.error("%s", error)
                break
            except OpenWeightsError as error:
                logger.warning("%s failed: %s", type(action).__name__, error)
            except Exception:  # noqa: BLE001 - one bad job or pod must not keep the others waiting
                logger.exception("%s failed", type(action).__name__)
        self._cleanup.run(seen.gone)
        self._cleanup.collect_garbage(seen.now)
        self._keep()

    def _recall(self, now: datetime) -> None:
        """At the first pass: which images and hardware have kept failing, and until when they rest.
        A manager that forgot that would pay for each of its restarts.
        """
        if self._kept is None:
            self._kept = self._store.manager_state()
            self._market = self._market.recalled(self._kept, now)

    def _keep(self) -> None:
        state = self._market.to_keep()
        if state != self._kept:
            self._store.set_manager_state(state)
            self._kept = state

    def observe(self) -> Seen:
        """Read pods, then rows and jobs."""
        now = self._store_time()
        pods = self._list_pods(now)
        rows = {row.id: row for row in self._store.worker_rows()}
        named = {id for pod in pods or () if (id := worker_of(pod.name)) is not None}
        if unknown := sorted(named - rows.keys() - self._foreign):
            found = {row.id: row for row in self._store.worker_rows(unknown)}
            # The row is written before the pod is asked for, so a pod without one is not ours.
            self._foreign.update(set(unknown) - found.keys())
            rows.update(found)
        # What waits before what runs: a job that is taken in between is seen twice, not never.
        pending = self._store.pending_jobs()
        running = self._store.list_jobs(statuses=["in_progress"], limit=None)
        return self._watch.see(now, pods, list(rows.values()), pending, running)

    def plan(self, seen: Seen) -> tuple[Action, ...]:
        """What is to be done now."""
        self._learn(seen)
        return plan(seen.jobs, seen.workers, seen.pods, self._limits, self._market, seen.now)

    # ---- looking ---------------------------------------------------------------------------------

    def _store_time(self) -> datetime:
        """The store's clock: by it rows are written, and this machine's may be wrong."""
        ahead = self._clock() - self._store.now()
        if abs(ahead - self._ahead) > timedelta(seconds=MOST_SKEW_S):
            seconds = ahead.total_seconds()
            logger.warning(
                "this machine's clock is %.0f s %s the store's, which is the one that counts",
                abs(seconds),
                "ahead of" if seconds > 0 else "behind",
            )
        self._ahead = ahead
        return self._time()

    def _time(self) -> datetime:
        return self._clock() - self._ahead

    def _list_pods(self, now: datetime) -> list[Pod] | None:
        if self._quiet_until is not None and now < self._quiet_until:
            return None
        try:
            pods = self._pods.list_pods()
            if self._market.needs_refresh(now):
                self._restock(now)
        except RateLimited as error:
            self._be_quiet(error, now)
        except PodsUnavailable as error:
            logger.warning("the pods cannot be listed: %s", error)
        else:
            return pods
        return None

    def _restock(self, now: datetime) -> None:
        """Prices and stock are good to know; without them pods are looked after all the same."""
        try:
            listings = self._pods.stock()
        except RateLimited:
            raise
        except OpenWeightsError as error:
            logger.warning("prices and stock are not known anew: %s", error)
            listings = []
        self._market = self._market.restocked(listings, now)

    def _be_quiet(self, error: RateLimited, now: datetime) -> None:
        logger.warning("%s", error)
        self._quiet_until = now + timedelta(seconds=error.retry_after_s)

    def _learn(self, seen: Seen) -> None:
        """What workers prove about the hardware that was rented."""
        for worker in seen.workers:
            if not worker.is_managed or worker.id in self._proven:
                continue
            if worker.status == "active" and worker.vram_gb:
                self._market = self._market.measured(worker.hardware_type, worker.vram_gb)
            if worker.job is not None:
                self._proven.add(worker.id)
                self._market = self._market.came_up(
                    worker.hardware_type, worker.cloud_type, worker.docker_image
                )
        shown = {worker.id for worker in seen.workers}
        self._proven &= shown
        self._ended_here &= shown
        self._made &= shown

    def _log_size(self, worker_id: str) -> tuple[int, int] | None:
        runs = self._store.list_runs(worker_id=worker_id, status="in_progress", limit=1)
        return (runs[0].id, runs[0].log_bytes) if runs else None

    # ---- doing -----------------------------------------------------------------------------------

    def _apply(self, action: Action, seen: Seen) -> None:
        match action:
            case StartWorker():
                self._start(action, seen)
            case AdoptPod():
                logger.info("pod %s is worker %s", action.pod_id, action.worker_id)
                self._store.set_worker_pod(action.worker_id, action.pod_id, action.usd_per_hour)
            case StopWorker():
                logger.info("asking worker %s to end: %s", action.worker_id, action.reason)
                self._store.set_worker_status(action.worker_id, "shutdown")
                if action.is_faulty:
                    self._boot_failed(action.worker_id, seen)
            case EndWorker():
                self._end(action, seen)
            case TerminatePod():
                self._terminate(action, seen)
            case ReportPod() | ReportJobs():
                pass  # see `step`

    def _start(self, action: StartWorker, seen: Seen) -> None:
        worker_id = self._new_id()
        offers = [o for o in action.offers if not self._market.is_cooling(o, self._time())]
        if not offers or self._market.is_paused(self._time()):
            return
        self._made.add(worker_id)
        self._write_row(worker_id, action.image, offers[0])
        try:
            self._check_alone(seen)
            if self._start_one_of(offers, worker_id, action):
                return
        except OutcomeUnknown as error:
            # Its row waits: the pod is adopted when it shows, or the row ends.
            logger.warning("%s", error)
            return
        except OpenWeightsError:
            self._give_up(worker_id)
            raise
        self._give_up(worker_id)

    def _check_alone(self, seen: Seen) -> None:
        """Raises _NotAlone when somebody else has written rows of pods since we have looked.

        Our own row stands by now, so of two managers at least one sees the other's: there may be no
        pod for either, but never two. A lock on one machine would not know of the other's.
        """
        known = self._made | {worker.id for worker in seen.workers}
        others = [
            row.id
            for row in self._store.worker_rows()
            if row.id not in known
            and row.provider == self._pods.name
            and row.status != "terminated"
        ]
        if others:
            raise _NotAlone(
                f"another manager has just started {', '.join(others)} for this organization; "
                "nothing is started now. End all managers but one"
            )

    def _give_up(self, worker_id: str) -> None:
        self._cleanup.look_again()
        self._store.set_worker_status(worker_id, "terminated")

    def _start_one_of(self, offers: Sequence[Offer], worker_id: str, action: StartWorker) -> bool:
        key = self._new_key(worker_id)
        for number, offer in enumerate(offers):
            if number > 0:
                self._write_row(worker_id, action.image, offer)
            try:
                pod = self._pods.start(
                    request_of(worker_id, action.image, offer, self._worker_env, key)
                )
            except NoCapacity:
                logger.info("no %s on %s now", offer.hardware_type, offer.cloud)
                self._market = self._market.refused(offer, self._time())
                continue
            except PodRefused as error:
                logger.error("%s on %s: %s", offer.hardware_type, offer.cloud, error)
                self._market = self._market.refused(offer, self._time())
                continue
            except SpendingLimit as error:
                logger.error("no pods for now: %s", error)
                self._market = self._market.spending_limit(self._time())
                return False
            self._market = self._market.started(offer)
            logger.info(
                "started %s on %s for job %s: worker %s, pod %s",
                *(offer.hardware_type, offer.cloud, action.job_id, worker_id, pod.id),
            )
            self._record_pod(worker_id, pod, offer)
            return True
        return False

    def _record_pod(self, worker_id: str, pod: Pod, offer: Offer) -> None:
        price = offer.usd_per_hour if pod.usd_per_hour is None else pod.usd_per_hour
        try:
            self._store.set_worker_pod(worker_id, pod.id, price)
        except OpenWeightsError as error:
            # No reason for another pod: the next pass finds it by its name.
            logger.warning("pod %s is there, but could not be recorded: %s", pod.id, error)

    def _write_row(self, worker_id: str, image: str, offer: Offer) -> None:
        row = row_of(worker_id, image, offer)
        price = offer.usd_per_hour
        self._store.create_worker(row, provider=self._pods.name, price_usd_per_hour=price)

    def _new_key(self, worker_id: str) -> str:
        """A key that is good for this worker alone."""
        return self._store.create_key(
            pod_name(worker_id),
            "worker",
            worker_id=worker_id,
            expires_at=self._time() + timedelta(days=KEY_DAYS),
        ).key

    def _end(self, action: EndWorker, seen: Seen) -> None:
        logger.warning("worker %s has ended: %s", action.worker_id, action.reason)
        self._store.set_worker_status(action.worker_id, "terminated")
        self._ended_here.add(action.worker_id)
        if action.is_boot_failure:
            self._boot_failed(action.worker_id, seen)
        else:
            self._keep_last_lines(action.worker_id, seen)

    def _boot_failed(self, worker_id: str, seen: Seen) -> None:
        """Count it against hardware and image, unless the worker did run something unseen."""
        if self._store.list_runs(worker_id=worker_id, limit=1):
            return
        worker = next(worker for worker in seen.workers if worker.id == worker_id)
        self._market = self._market.boot_failed(
            worker.hardware_type, worker.cloud_type, worker.docker_image, seen.now
        )
        if last := self._last_lines(worker.pod_id):
            logger.warning("the last lines of worker %s:\n%s", worker_id, last)

    def _last_lines(self, pod_id: str | None) -> str:
        """What a pod has printed last, without keys; empty where that cannot be had any more."""
        if pod_id is None:
            return ""
        try:
            lines = self._pods.logs(pod_id).splitlines()[-20:]
        except OpenWeightsError:
            return ""
        return _SECRET.sub("[redacted]", "\n".join(lines))

    def _keep_last_lines(self, worker_id: str, seen: Seen) -> None:
        """Put what the pod of a lost run has printed last into the run's log: it says why the
        worker died, and goes with the pod.
        """
        worker = next(worker for worker in seen.workers if worker.id == worker_id)
        runs = self._store.list_runs(worker_id=worker_id, limit=1)
        if worker.job is None or not runs or not (last := self._last_lines(worker.pod_id)):
            return
        text = f"[openweights] its pod ended, and had printed last:\n{last}\n"
        self._store.append_log(runs[0].id, runs[0].log_bytes, text.encode())

    def _terminate(self, action: TerminatePod, seen: Seen) -> None:
        logger.info("ending pod %s of %s: %s", action.pod_id, action.worker_id, action.reason)
        self._pods.terminate(action.pod_id, pod_name(action.worker_id))
        # What it costs ends when it is listed no more: see `Cleanup`.
        if action.is_boot_failure and action.worker_id not in self._ended_here:
            # It signed off by itself before it had done anything, as one with a broken GPU does.
            self._ended_here.add(action.worker_id)
            self._boot_failed(action.worker_id, seen)
