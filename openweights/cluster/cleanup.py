"""What remains to be done when a worker has ended: its pod costs nothing more, its key is dead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from openweights.cluster.planning.observation import pod_name
from openweights.cluster.store import ClusterStore
from openweights.errors import OpenWeightsError

logger = logging.getLogger(__name__)


class Cleanup:
    """Costs end with pods, and keys with workers. What fails is tried again in the next pass."""

    def __init__(self, store: ClusterStore) -> None:
        self._store = store
        # None: keys are to be looked through, as after a start.
        self._known_live: frozenset[str] | None = None
        self._collects_at: datetime | None = None

    def look_again(self) -> None:
        """A key was made for a worker that did not come."""
        self._known_live = None

    def run(self, gone: Iterable[str]) -> None:
        """End costs and keys that have outlived their workers.

        Args:
            gone: Ended workers whose pods are no longer there.
        """
        for worker_id in gone:
            self._attempt(lambda id=worker_id: self._store.end_worker_pod(id))
        live = self._live()
        if self._known_live is None or self._known_live - live:
            self._known_live = live if self._revoke_keys() else None
        else:
            self._known_live = live

    def collect_garbage(self, now: datetime) -> None:
        """Once a day, where the organization says for how long things are kept."""
        if self._collects_at is not None and now < self._collects_at:
            return
        self._collects_at = now + timedelta(days=1)
        _, keep_days = self._store.retention()
        if keep_days is not None:
            found = self._store.collect_garbage(keep_days * 86_400)
            logger.info("removed %s old files and %s old logs", found.files, found.logs)

    def _revoke_keys(self) -> bool:
        keys = self._store.list_keys()
        # Rows after keys: every key that is seen has had its row before.
        live = self._live()
        has_worked = True
        for key in keys:
            made_here = key.worker_id is not None and key.name == pod_name(key.worker_id)
            if made_here and key.revoked_at is None and key.worker_id not in live:
                has_worked &= self._attempt(lambda id=key.id: self._store.revoke_key(id))
        return has_worked

    def _live(self) -> frozenset[str]:
        return frozenset(row.id for row in self._store.worker_rows() if row.status != "terminated")

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Whether it worked; one bad row must not keep the others open."""
        try:
            call()
        except OpenWeightsError as error:
            logger.warning("an ended worker's costs or key could not be ended: %s", error)
            return False
        return True
