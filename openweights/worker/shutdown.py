"""A worker's request to end: by a signal, by the store, hurried by a second signal; and trying
again for as long as nobody hurries it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, TypeVar

from openweights.errors import StoreUnavailableError
from openweights.retry import retry

logger = logging.getLogger(__name__)
T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPORT_S = 15.0  # after the job's grace, for delivering what it left
HAND_BACK_S = 2.0  # of a machine's notice, for killing the job and telling the store


class Stoppable(Protocol):
    """What runs at the moment and has to hear of a shutdown."""

    def instruct_shutdown(self) -> None: ...

    def kill(self) -> None: ...


class Shutdown:
    """Two stages: `requested` (end in good order) and `hurry` (kill the job, and do not wait for
    the store).

    The second follows the first by itself when the grace and the time for reporting are over.

    Args:
        grace_s: What a job has for saving when it is stopped.
        notice_s: From SIGTERM to SIGKILL where a machine is taken back: after a signal the job has
            no longer for saving than leaves time to hand it back. None where nothing is known.
    """

    def __init__(self, grace_s: float, notice_s: float | None = None) -> None:
        self.requested = threading.Event()
        self.hurry = threading.Event()
        self._patience_s = grace_s + REPORT_S
        self._notice_s = notice_s
        self._lock = threading.RLock()
        self._running: Stoppable | None = None

    def request(self) -> None:
        """Ask for the end; asking again changes nothing."""
        with self._lock:
            if self.requested.is_set():
                return
            self.requested.set()
            timer = threading.Timer(self._patience_s, self.hurry_up)
            timer.daemon = True
            timer.start()
            if self._running is not None:
                self._running.instruct_shutdown()

    def hurry_up(self) -> None:
        """Ask for the end now."""
        self.request()
        with self._lock:
            self.hurry.set()
            if self._running is not None:
                self._running.kill()

    def follow(self, pipe_fd: int) -> None:
        """Request the end with that of the pipe: whoever holds its other end need not live to close
        it.
        """
        threading.Thread(target=self._read_to_end, args=(pipe_fd,), daemon=True).start()

    def _read_to_end(self, pipe_fd: int) -> None:
        while os.read(pipe_fd, 1):
            pass
        if not self.requested.is_set():
            logger.warning("the process that started this worker is gone: ending")
        self.request()

    @contextlib.contextmanager
    def reaching(self, running: Stoppable) -> Iterator[None]:
        """Pass requests on to `running`, also one that was made before."""
        with self._lock:
            self._running = running
            if self.requested.is_set():
                running.instruct_shutdown()
        try:
            yield
        finally:
            with self._lock:
                self._running = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT or SIGHUP requests the end, a second one hurries. In the main thread
        only; elsewhere nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)

        def note(signum: int, _frame: object) -> None:
            # A handler may interrupt any line, also one that holds a lock: it writes a byte and a
            # thread does the rest.
            with contextlib.suppress(OSError):
                os.write(write_fd, bytes([signum]))

        # A signal that our parent ignores (nohup) stays ignored.
        before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        for signum in before:
            signal.signal(signum, note)
        listener = threading.Thread(target=self._listen, args=(read_fd,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            os.close(write_fd)
            listener.join()
            os.close(read_fd)

    def _listen(self, read_fd: int) -> None:
        while received := os.read(read_fd, 1):
            name = signal.Signals(received[0]).name
            if self.requested.is_set():
                logger.warning("%s again: ending now", name)
                self.hurry_up()
            else:
                logger.warning("%s: ending; the job, if any, may save and goes back", name)
                self.request()
                self._heed_notice()

    def _heed_notice(self) -> None:
        if self._notice_s is None:
            return
        timer = threading.Timer(max(0.0, self._notice_s - HAND_BACK_S), self._kill_running)
        timer.daemon = True
        timer.start()

    def _kill_running(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.kill()


def persist(call: Callable[[], T], *, give_up: threading.Event) -> T:
    """The answer of `call`, tried again for as long as the store cannot be reached.

    Raises:
        StoreUnavailableError: `give_up` was set and the store is still away.
    """
    return retry(call, StoreUnavailableError, pause=give_up.wait, on_error=warn_of_outage)


def warn_of_outage(error: Exception, delay_s: float) -> None:
    logger.warning("the store is away, trying again in %.1f s: %s", delay_s, error)


@contextlib.contextmanager
def sole_holder(path: Path) -> Iterator[IO[str] | None]:
    """The file at `path`, emptied and locked meanwhile; None when somebody else holds it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            file.truncate(0)
            yield file
