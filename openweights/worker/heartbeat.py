"""The thread that keeps a worker's lease and hears of cancels, whatever the job does."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from openweights.errors import ConfigurationError, NotFoundError, StoreUnavailableError
from openweights.types import Instruction

logger = logging.getLogger(__name__)

# A project may refuse a good key for a moment, while its schema or its own key is changed.
_MOST_REFUSALS = 3


class Pulse(Protocol):
    """The one verb of a store that this thread needs."""

    def heartbeat(self, worker_id: str, run_id: int | None = None) -> Instruction: ...


class Heartbeat:
    """Calls `heartbeat` every `interval_s` from a thread of its own.

    An instruction goes to the receiver of the run that was asked about, never to whichever run is
    current by then.
    """

    def __init__(
        self, store: Pulse, worker_id: str, interval_s: float, on_shutdown: Callable[[], None]
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._interval_s = interval_s
        self._on_shutdown = on_shutdown
        self._ended = threading.Event()
        self._watched: tuple[int, Callable[[Instruction], None]] | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # Not for ever: a call that hangs in the network must not keep the worker.
        self._thread.join(timeout=self._interval_s)

    @contextlib.contextmanager
    def watching(self, run_id: int, receiver: Callable[[Instruction], None]) -> Iterator[None]:
        """Renew this run's lease meanwhile, and pass what the store says about it to `receiver`."""
        self._watched = (run_id, receiver)
        try:
            yield
        finally:
            self._watched = None

    def _beat(self) -> None:
        is_away = False
        refusals = 0
        while not self._ended.wait(self._interval_s):
            try:
                self._beat_once()
            except StoreUnavailableError as error:
                if not is_away:
                    logger.warning("heartbeat: the store is away: %s", error)
                is_away = True
            except NotFoundError as error:
                logger.error("heartbeat: the store was deleted or replaced: %s", error)
                self._stop_all()
                return
            except ConfigurationError as error:
                logger.error("heartbeat: %s", error)
                refusals += 1
                if refusals == _MOST_REFUSALS:
                    self._stop_all()
                    return
            except Exception:  # noqa: BLE001 - the loop of a daemon: the lease must not end with one error
                logger.exception("heartbeat failed")
            else:
                is_away, refusals = False, 0

    def _beat_once(self) -> None:
        watched = self._watched
        if watched is None:
            instruction = self._store.heartbeat(self._worker_id)
        else:
            instruction = self._store.heartbeat(self._worker_id, watched[0])
        if instruction == "shutdown":
            self._on_shutdown()
        elif watched is not None and instruction != "continue":
            watched[1](instruction)

    def _stop_all(self) -> None:
        """Worker, run or key is no longer good: whatever the job makes, nobody will take it."""
        watched = self._watched
        if watched is not None:
            watched[1]("fenced")
        self._on_shutdown()
