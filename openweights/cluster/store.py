"""What the cluster manager asks of a store beyond what every store can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from openweights.backends.base import Backend
from openweights.types import KeyRecord, NewKey, PendingRow, WorkerRow, WorkerSpec


class ClusterStore(Backend, Protocol):
    """A store whose workers run in pods that somebody pays for."""

    def pending_jobs(self) -> list[PendingRow]:
        """Every pending job."""
        ...

    def worker_rows(self, worker_ids: Sequence[str] | None = None) -> list[WorkerRow]:
        """Workers that are not terminated; with `worker_ids` these, whatever their status. An id
        that has no row is left out.
        """
        ...

    def create_worker(
        self, worker: WorkerSpec, *, provider: str, price_usd_per_hour: float | None
    ) -> None:
        """Write the row of a worker that is about to be started, with status `starting`. Atomic.

        Again for a row that is still starting and has no pod: replaces what was written.

        Raises:
            InvalidStateError: A worker of that id is beyond that.
        """
        ...

    def set_worker_pod(self, worker_id: str, pod_id: str, price_usd_per_hour: float | None) -> None:
        """Record the worker's pod, and from now on its costs. A price of None keeps the known one.

        Raises:
            InvalidStateError: The worker is terminated.
        """
        ...

    def end_worker_pod(self, worker_id: str) -> None:
        """Record that the pod is gone: it costs nothing from now on, and the worker is terminated.
        Again changes nothing.
        """
        ...

    def retention(self) -> tuple[int, float | None]:
        """MB of a run's log at most, and for how many days what nobody needs is kept; None for
        ever.
        """
        ...

    def manager_state(self) -> dict[str, Any]:
        """What `set_manager_state` has kept; empty at first."""
        ...

    def set_manager_state(self, state: Mapping[str, Any]) -> None:
        """Keep what a manager has to know after a restart."""
        ...

    def create_key(
        self,
        name: str,
        role: str,
        *,
        expires_at: datetime | None = None,
        worker_id: str | None = None,
        budget_usd: float | None = None,
    ) -> NewKey:
        """Make a key; for the role `worker` it may be bound to one worker id."""
        ...

    def list_keys(self) -> list[KeyRecord]: ...

    def revoke_key(self, key_id: str) -> None:
        """The key counts no more, at once. Again changes nothing."""
        ...
