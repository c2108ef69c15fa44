"""Sends a run's events in the background: logging never waits for the store, and nothing logged is
lost.

`EventSender.log` writes one line to a spool file and returns. A thread reads the file and appends
its lines to the run, in order and in batches; while the store is away it tries again. The file is
removed once all of it is stored. If the process is killed, the file stays, and `replay_spool` sends
what is in it: each line has a key, so what was sent already is skipped.

A spool file is named `<run id>-<process id>-<8 hex>.jsonl`; a line is `{"key": …, "created_at": …,
"data": {…}}`.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from openweights.client.event_json import event_data
from openweights.errors import (
    FencedError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    StoreUnavailableError,
    wants_room,
)
from openweights.types import EventDraft

if TYPE_CHECKING:
    from openweights.backends.base import Backend

logger = logging.getLogger(__name__)

BATCH_EVENTS = 500
BATCH_BYTES = 1 << 20
FLUSH_AT_EXIT_S = 30.0
FULL_DISK_WAIT_S = 300.0
_FIRST_RETRY_S = 0.2
_LONGEST_RETRY_S = 10.0
# Events that come in quick succession share a batch; one of this size is not held back.
_GATHER_S = 0.05
_GATHER_BYTES = 1 << 16
_SPOOL_NAME = re.compile(r"(\d+)-\d+-[0-9a-f]{8}\.jsonl")


def at_exit(call: Callable[[], object]) -> None:
    """Call it when this process ends, also where it is a child of `multiprocessing` that was
    forked: those end without what `atexit` knows.
    """
    atexit.register(call)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, call, exitpriority=0)


class EventSender:
    """Sends the events of one run from one process.

    Args:
        backend: Where they go.
        run_id: Run that they belong to.
        spool_dir: Folder of the spool file; default: a new temporary folder.
    """

    def __init__(self, backend: Backend, run_id: int, spool_dir: Path | None = None) -> None:
        self.pid = os.getpid()
        self.run_id = run_id
        self._backend = backend
        self._own_folder = spool_dir is None
        folder = (
            Path(tempfile.mkdtemp(prefix="openweights-spool-")) if spool_dir is None else spool_dir
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{run_id}-{self.pid}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._lock = threading.Lock()
        self._change = threading.Condition(self._lock)
        self._written = 0
        self._sent = 0
        self._closing = False
        self._given_up = False
        self._has_life_to_tell = False
        self._flushing = 0
        self._sent_at = -math.inf
        self._thread = threading.Thread(
            target=self._send_all, name="openweights-events", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            os.close(self._file)
            self.path.unlink()
            raise InvalidStateError(
                f"run {run_id} can log nothing more: the process is ending"
            ) from error
        at_exit(self.close)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more events."""
        return self._closing

    def log(self, data: Mapping[str, Any]) -> None:
        """Write an event down, to be sent soon.

        Raises:
            InvalidInputError: `data` is no JSON; the message names the key.
            InvalidStateError: It is closed.
        """
        line = _line(event_data(data))
        with self._lock:
            if self._closing:
                raise InvalidStateError(f"the event sender of run {self.run_id} is closed")
            if self._given_up:
                return
            self._append(line)
            self._change.notify_all()

    def tell_life(self) -> None:
        """Say soon that the run lives, as events do by themselves. If the store is away it never
        hears of it.
        """
        with self._lock:
            self._has_life_to_tell = True
            self._change.notify_all()

    def flush(self, timeout: float = FLUSH_AT_EXIT_S) -> bool:
        """Wait until all that was logged is stored.

        Returns:
            Whether it is.
        """
        if os.getpid() != self.pid:
            # A forked child: thread and file are its parent's, and the lock may be held for ever.
            return False
        with self._lock:
            self._flushing += 1
            self._change.notify_all()
            self._change.wait_for(lambda: self._sent >= self._written or self._given_up, timeout)
            self._flushing -= 1
            return self._sent >= self._written

    def close(self, timeout: float = FLUSH_AT_EXIT_S) -> bool:
        """Flush, stop the thread, and remove the spool file if all of it is stored.

        Returns:
            Whether all is stored. If not, the spool file stays.
        """
        if os.getpid() != self.pid:
            return False
        if not self._closing:  # else its thread has ended, and there is nothing to wait for
            self.flush(timeout)
        with self._lock:
            if self._closing:
                return self._sent >= self._written
            self._closing = True
            self._change.notify_all()
        atexit.unregister(self.close)
        self._thread.join(timeout=1.0)
        # Now, not before: an event may have come between the flush and the closing.
        done = self._sent >= self._written
        os.close(self._file)
        if done or self._given_up:
            self.path.unlink(missing_ok=True)
            if self._own_folder:
                self.path.parent.rmdir()
        else:
            logger.warning(
                "events of run %s were not sent in time; they are in %s", self.run_id, self.path
            )
        return done

    def _append(self, line: bytes) -> None:
        """Write a line; where the disk is full, wait for room, as a store is waited for."""
        until = time.monotonic() + FULL_DISK_WAIT_S
        while (error := self._write(line)) is not None:
            if not wants_room(error) or time.monotonic() >= until:
                raise PlatformError(
                    f"cannot keep an event in {self.path}: {error.strerror}; see to that disk, and "
                    "restart the job, which goes on from its last checkpoint"
                ) from error
            self._change.wait(_FIRST_RETRY_S)  # without the lock: the thread goes on
        self._written += len(line)

    def _write(self, line: bytes) -> OSError | None:
        """Write the whole line or nothing; what went wrong."""
        done = 0
        try:
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            # Half a line would spoil the next one.
            os.ftruncate(self._file, self._written)
            return error
        return None

    # ---- the thread ------------------------------------------------------------------------------

    def _send_all(self) -> None:
        retry_s = _FIRST_RETRY_S
        with self.path.open("rb") as lines:
            while self._wait_for_news():
                if self._written == self._sent:
                    self._touch()
                    continue
                lines.seek(self._sent)
                batch, size = _read_batch(lines)
                if self._send(batch):
                    retry_s = _FIRST_RETRY_S
                    self._sent_at = time.monotonic()
                    with self._lock:
                        self._sent += size
                        self._change.notify_all()
                elif self._given_up or self._pause(retry_s):
                    return
                else:
                    retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    def _wait_for_news(self) -> bool:
        """Wait for something to say; False when there will be nothing more."""
        with self._lock:
            self._change.wait_for(
                lambda: self._closing or self._written > self._sent or self._has_life_to_tell
            )
            has_life_to_tell, self._has_life_to_tell = self._has_life_to_tell, False
            if self._written == self._sent:
                return has_life_to_tell and not self._closing
            due_s = self._sent_at + self._backend.pace_s - time.monotonic()
            self._change.wait_for(self._must_send_now, max(due_s, _GATHER_S))
        return True

    def _must_send_now(self) -> bool:
        is_waited_for = self._closing or self._flushing > 0
        return is_waited_for or self._written - self._sent >= _GATHER_BYTES

    def _pause(self, seconds: float) -> bool:
        """Wait before trying again; True when the sender was closed meanwhile."""
        with self._lock:
            return self._change.wait_for(lambda: self._closing, seconds)

    def _touch(self) -> None:
        try:
            self._backend.touch_run(self.run_id)
        except Exception as error:  # noqa: BLE001 - the thread's loop: events may come, and say it, too
            logger.info("run %s could not say that it lives: %s", self.run_id, error)

    def _send(self, batch: list[EventDraft]) -> bool:
        try:
            self._backend.append_events(self.run_id, batch)
        except (FencedError, NotFoundError) as error:
            self._give_up(f"its later events are dropped: {error}")
            return False
        except (StoreUnavailableError, PlatformError) as error:
            logger.info("events of run %s wait, the store is away: %s", self.run_id, error)
            return False
        except OpenWeightsError as error:
            self._give_up(f"the store refuses its events: {error}")
            return False
        except Exception:  # noqa: BLE001 - the thread's loop: whatever it is, it must not end the sending
            logger.warning(
                "events of run %s could not be sent; trying again", self.run_id, exc_info=True
            )
            return False
        return True

    def _give_up(self, reason: str) -> None:
        logger.warning("run %s: %s", self.run_id, reason)
        with self._lock:
            self._given_up = True
            self._change.notify_all()


def replay_spool(backend: Backend, run_id: int, folder: Path) -> int:
    """Send what killed processes of a run left in `folder`, and remove the files. Events that are
    stored already are skipped; what is no event, or is refused by the store, is left out with a
    warning.

    Returns:
        How many events were in the files.

    Raises:
        StoreUnavailableError: Files not yet sent stay for another try.
    """
    count = 0
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.lstat().st_mtime_ns):
        name = _SPOOL_NAME.fullmatch(path.name)
        if name is None or int(name[1]) != run_id or path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as lines:
            for batch in _batches(lines):
                try:
                    _append_all(backend, run_id, batch)
                except (FencedError, NotFoundError) as error:
                    logger.warning("run %s: %s", run_id, error)
                    break
                count += len(batch)
        path.unlink()
    return count


def _append_all(backend: Backend, run_id: int, batch: Sequence[EventDraft]) -> None:
    """A batch is refused as a whole: then each of its events comes by itself."""
    try:
        backend.append_events(run_id, batch)
    except InvalidInputError as error:
        if len(batch) == 1:
            logger.warning("run %s: an event is left out: %s", run_id, error)
            return
        for event in batch:
            _append_all(backend, run_id, [event])


def _batches(lines: BinaryIO) -> Iterator[list[EventDraft]]:
    while True:
        batch, size = _read_batch(lines)
        if not size:
            return
        if batch:
            yield batch


def _read_batch(lines: BinaryIO) -> tuple[list[EventDraft], int]:
    """The events of the next whole lines, and the length of these in bytes."""
    batch: list[EventDraft] = []
    size, others = 0, 0
    while len(batch) < BATCH_EVENTS and size < BATCH_BYTES:
        line = lines.readline()
        # A line without its end was being written when the process was killed, or is being written
        # now.
        if not line.endswith(b"\n"):
            break
        size += len(line)
        try:
            record = json.loads(line)
            created_at = datetime.fromisoformat(record["created_at"])
            batch.append(EventDraft(str(record["key"]), dict(record["data"]), created_at))
        except (ValueError, KeyError, TypeError, RecursionError):
            others += 1  # something else has written into the file
    if others:
        logger.warning("%d lines of %s are no events, and are left out", others, lines.name)
    return batch, size


def _line(data: Mapping[str, Any]) -> bytes:
    record = {"key": uuid.uuid4().hex, "created_at": datetime.now(UTC).isoformat(), "data": data}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
