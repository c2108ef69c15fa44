"""An engine in a thread of its own, for an event loop with many requests at once.

The thread alone touches the engine. What the loop wants of it (a request, its end, another adapter)
waits in a queue that the thread empties before each step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TypeVar
from uuid import uuid4

from openweights.errors import OpenWeightsError, PlatformError
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import Delta, GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Deltas of a request as they come; an exception is how it ended otherwise.
_Inbox = asyncio.Queue["Delta | Exception"]


class EngineThread:
    """Works on requests until it is closed.

    Args:
        engine: Nobody else may use it from now on.
        loop: Where the requests come from.
    """

    def __init__(self, engine: GenerationEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self.end_token_ids = engine.end_token_ids
        self._loop = loop
        self._wishes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._inboxes: dict[str, _Inbox] = {}  # of the loop alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> int:
        """How many are being worked on."""
        return len(self._inboxes)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Deltas of a request until all its samples are finished.

        Closing the iterator, or canceling who waits for it, drops the request.

        Raises:
            ConfigError: The engine cannot work on it.
            PlatformError: The engine failed.
        """
        name = uuid4().hex
        inbox = self._inboxes[name] = asyncio.Queue()
        open_samples = request.params.n
        self._wishes.put(lambda: self._submit(replace(request, id=name)))
        try:
            while open_samples:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                open_samples -= item.finish_reason is not None
                yield item
        finally:
            del self._inboxes[name]
            if open_samples:
                self._wishes.put(lambda: self._engine.abort(name))

    async def call(self, act: Callable[[GenerationEngine], T]) -> T:
        """The result of `act` on the engine, between two of its steps."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = act(self._engine)
            except Exception as error:  # noqa: BLE001 - handed to whoever asked
                self._tell(_fail, future, error)
            else:
                self._tell(_succeed, future, result)

        self._wishes.put(run)
        return await future

    def close(self) -> None:
        """End the thread; requests that are not finished fail."""
        self._wishes.put(None)
        self._thread.join()

    # ---- in the thread

    def _run(self) -> None:
        while True:
            try:
                if not self._grant():
                    break
                deltas = self._engine.step()
            except Exception as error:  # noqa: BLE001 - a server goes on; the clients hear of it
                logger.exception("the engine failed")
                self._tell(self._fail_all, PlatformError(f"the engine failed: {error}"))
                for name in list(self._inboxes):
                    self._engine.abort(name)
                continue
            if deltas:
                self._tell(self._deliver, deltas)
        self._tell(self._fail_all, PlatformError("the server is shutting down"))

    def _grant(self) -> bool:
        """Do what is wished; False when that is the end. Waits while there is nothing to do."""
        while self._engine.is_idle or not self._wishes.empty():
            wish = self._wishes.get()
            if wish is None:
                return False
            wish()
        return True

    def _submit(self, request: GenerationRequest) -> None:
        try:
            self._engine.submit(request)
        except OpenWeightsError as error:
            self._tell(self._put, request.id, error)
        except Exception as error:  # noqa: BLE001 - this request's alone; the others go on
            logger.exception("the engine could not take a request")
            self._tell(self._put, request.id, PlatformError(f"the engine failed: {error}"))

    def _tell(self, act: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act, *arguments)

    # ---- in the loop

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._put(delta.request_id, delta)

    def _put(self, name: str, item: Delta | Exception) -> None:
        # One whose client has gone away has no inbox any more.
        if name in self._inboxes:
            self._inboxes[name].put_nowait(item)

    def _fail_all(self, error: Exception) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
