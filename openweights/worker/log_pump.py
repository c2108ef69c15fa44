"""A job's output, from its pipe into the store while it runs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import threading
import time
from collections import deque

from openweights.backends.base import Backend
from openweights.errors import ConfigurationError, OpenWeightsError, StoreUnavailableError
from openweights.retry import retry
from openweights.worker.redaction import Redactor
from openweights.worker.shutdown import warn_of_outage

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 16
SEND_BYTES = 1 << 20
SEND_EVERY_S = 0.25
ALIVE_EVERY_S = 30.0
# What waits for a store that is away. When it is full the job blocks in its next print, rather than
# the worker growing without bound.
MOST_WAITING_BYTES = 64 << 20
TAIL_BYTES = 8192
# When the job has ended, what is in the pipe is there at once; a pipe that still gives more after
# this is held by a process that escaped, and is not waited for.
DRAIN_S = 2.0
_NOTES_BYTES = 300  # what is said of what is missing of a long log


class LogPump:
    """Reads bytes, redacts them, and appends them to the run's log in order, from two threads.

    One thread reads, so that the job never waits for the store; the other sends, and tries again
    while the store is away. Of a log that is longer than the store keeps the middle is left out.
    """

    def __init__(
        self, backend: Backend, run_id: int, redactor: Redactor, give_up: threading.Event
    ) -> None:
        self._backend = backend
        self._run_id = run_id
        self._redactor = redactor
        self._give_up = give_up
        self._changed = threading.Condition()
        self._waiting = bytearray()
        self._window = LogWindow(backend.log_limit_bytes)
        self._tail = b""
        self._is_complete = False
        self._is_discarded = False
        self._was_held_back = False
        self._said_at = float("-inf")
        self._job_ended = threading.Event()
        self._reader: threading.Thread | None = None
        self._sender = threading.Thread(target=self._send, name="log sender", daemon=True)
        self._sender.start()

    def attach(self, fd: int) -> None:
        """Begin to read the job's output."""
        self._reader = threading.Thread(
            target=self._read, args=(fd,), name="log reader", daemon=True
        )
        self._reader.start()

    def note(self, text: str) -> None:
        """A line of the worker's own, at this place of the log; it is no output of the job. Not to
        be used while the job is running.
        """
        self._put(self._redactor.flush())
        line = f"[openweights] {text}\n".encode(errors="backslashreplace")
        self._put(self._redactor.feed(line) + self._redactor.flush(), is_output=False)

    def drain(self) -> None:
        """The job has ended: read what it left in the pipe. The pipe may be closed afterwards."""
        self._job_ended.set()
        if self._reader is not None:
            self._reader.join()
        self._reader = None
        self._put(self._redactor.flush())

    def finish(self) -> None:
        """Return when all is stored, or when the worker gave up on a store that is away."""
        self.drain()
        with self._changed:
            self._waiting += self._window.flush()
            self._is_complete = True
            self._changed.notify_all()
        self._sender.join()

    def discard(self) -> None:
        """Store nothing more: the log is no longer ours."""
        with self._changed:
            self._is_discarded = True
            self._waiting.clear()
            self._changed.notify_all()

    def last_lines(self, count: int = 12) -> str:
        """The end of the output, redacted."""
        lines = re.split(rb"[\r\n]+", self._tail.rstrip())[-count:]
        return b"\n".join(lines).decode(errors="replace")

    def _read(self, fd: int) -> None:
        deadline = float("inf")
        while time.monotonic() < deadline:
            ready, _, _ = select.select([fd], [], [], 0.1)
            if ready:
                data = os.read(fd, READ_BYTES)
                if not data:
                    return
                self._put(self._redactor.feed(data))
            elif self._job_ended.is_set():
                return
            if self._job_ended.is_set():
                deadline = min(deadline, time.monotonic() + DRAIN_S)

    def _put(self, data: bytes, *, is_output: bool = True) -> None:
        if not data:
            return
        with self._changed:
            if is_output:
                self._tail = (self._tail + data)[-TAIL_BYTES:]
            while len(self._waiting) >= MOST_WAITING_BYTES and not self._is_hopeless():
                self._changed.wait(1.0)
            if not self._is_hopeless():
                kept = self._window.feed(data)
                self._waiting += kept
                self._was_held_back |= not kept
                self._changed.notify_all()

    def _is_hopeless(self) -> bool:
        return self._is_discarded or self._give_up.is_set()

    def _send(self) -> None:
        offset = 0
        while data := self._next():
            try:
                if not self._deliver(offset, data):
                    return
            except ConfigurationError as error:
                logger.error("run %s: no more of its log is kept: %s", self._run_id, error)
                self.discard()
                return
            except Exception:  # noqa: BLE001 - a store's refusal of the log must not end the job
                logger.exception(
                    "run %s: the store refused the log from byte %s", self._run_id, offset
                )
                self.discard()
                return
            offset += len(data)
            with self._changed:
                del self._waiting[: len(data)]
                self._changed.notify_all()
                # Small writes are collected, so that a chatty job does not mean a write per line.
                pause_s = max(SEND_EVERY_S, self._backend.pace_s)
                self._changed.wait_for(self._must_send_now, pause_s)

    def _must_send_now(self) -> bool:
        return self._is_complete or self._is_discarded or len(self._waiting) >= SEND_BYTES

    def _next(self) -> bytes:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_due() or self._was_held_back)
                if self._is_due():
                    return bytes(self._waiting[:SEND_BYTES])
                self._was_held_back = False
            # It prints, although the store sees nothing of the middle of a long log.
            self.say_alive()

    def _is_due(self) -> bool:
        return bool(self._waiting) or self._is_complete or self._is_discarded

    def say_alive(self) -> None:
        """Where the log does not tell: the run gets further."""
        if time.monotonic() - self._said_at >= ALIVE_EVERY_S:
            self._said_at = time.monotonic()
            with contextlib.suppress(OpenWeightsError):
                self._backend.touch_run(self._run_id)

    def _deliver(self, offset: int, data: bytes) -> bool:
        """False when it was given up, because the store is away."""
        try:
            retry(
                lambda: self._backend.append_log(self._run_id, offset, data),
                StoreUnavailableError,
                pause=lambda delay_s: self._give_up.wait(delay_s) or self._is_discarded,
                on_error=warn_of_outage,
            )
        except StoreUnavailableError:
            return False
        return True


class LogWindow:
    """Of a long log lets the beginning through and holds the end back, so that both together, and
    what is said of what is missing, have at most `most_bytes`.
    """

    def __init__(self, most_bytes: int) -> None:
        self._head_left = most_bytes * 3 // 4
        self._most_tail = max(most_bytes // 4 - _NOTES_BYTES, 0)
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._left_out = 0

    def feed(self, data: bytes) -> bytes:
        """What is to be stored now."""
        if not self._head_left:
            self._hold(data)
            return b""
        head, rest = data[: self._head_left], data[self._head_left :]
        self._head_left -= len(head)
        if self._head_left:
            return head
        self._hold(rest)
        return head + (
            b"\n[openweights] this log is long: its end, of at most "
            b"%d bytes, is shown when the run ends\n" % self._most_tail
        )

    def flush(self) -> bytes:
        """The end of the log; nothing if all of it is there."""
        tail = b"".join(self._tail)
        surplus = max(len(tail) - self._most_tail, 0)
        if not self._left_out + surplus:
            return tail
        # A line that begins in what is left out is left out as a whole, if that leaves others.
        surplus += tail[surplus:].find(b"\n", 0, self._most_tail // 2) + 1
        note = b"[openweights] %d bytes are left out here\n" % (self._left_out + surplus)
        return note + tail[surplus:]

    def _hold(self, data: bytes) -> None:
        self._tail.append(data)
        self._tail_bytes += len(data)
        while self._tail_bytes - len(self._tail[0]) >= self._most_tail:
            dropped = self._tail.popleft()
            self._tail_bytes -= len(dropped)
            self._left_out += len(dropped)
