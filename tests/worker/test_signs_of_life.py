"""Long work that logs nothing is no hang, as long as it gets further; what only ticks is one."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from openweights import progress
from openweights.backends.base import Backend
from openweights.worker import log_pump
from tests.waiting import HANGS_S
from tests.worker.harness import Jobs, WorkerThread

InThread = Callable[..., WorkerThread]
STALL_S, DOWNLOAD_STALL_S = 4.0, 1.0
GENERATING = Path(__file__).with_name("generating.py").read_bytes()


def test_a_long_generation_is_no_hang(jobs: Jobs, backend: Backend, in_thread: InThread) -> None:
    """As the teacher gate of a slow model: twice as long as a run may be quiet, and nothing logged.
    The control gives no token, though its threads tick, log to a file and poll the store.
    """
    files = {"generating.py": GENERATING}
    options: dict[str, Any] = {"stall_timeout_s": STALL_S, "max_attempts": 1}
    goes_on = jobs.submit(f"{sys.executable} generating.py goes-on", files, **options)
    hangs = jobs.submit(f"{sys.executable} generating.py hangs", files, **options)
    with in_thread():
        assert jobs.wait_for_end(goes_on) == "completed", jobs.error(goes_on)
        assert jobs.wait_for_end(hangs) == "failed"
    assert jobs.log(goes_on) == b"begun\n" and jobs.events(goes_on) == []
    assert "no log line, event or sign of life" in str(jobs.error(hangs))


class SlowFiles:
    """A store from which a file takes its time: in `pieces`, each after a pause."""

    def __init__(self, backend: Backend, pieces: int) -> None:
        self._backend, self._pieces = backend, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def open_file(self, file_id: str) -> BinaryIO:
        with self._backend.open_file(file_id) as content:
            return _Slow(content.read(), self._pieces)


class _Slow(io.BytesIO):
    def __init__(self, content: bytes, pieces: int) -> None:
        super().__init__(content)
        self._length, self._size = len(content), len(content) // pieces
        self._pause_s = 2.0 * DOWNLOAD_STALL_S / pieces

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() < self._length:
            time.sleep(self._pause_s)
        return super().read(self._size)


@pytest.mark.parametrize(("pieces", "status"), [(16, "completed"), (1, "failed")])
def test_a_long_download_before_the_job_is_no_hang(
    jobs: Jobs,
    backend: Backend,
    in_thread: InThread,
    monkeypatch: pytest.MonkeyPatch,
    pieces: int,
    status: str,
) -> None:
    """In one piece nothing arrives for too long: the control."""
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(log_pump, "ALIVE_EVERY_S", 0.1)
    file = {"data": bytes(16 * progress.LEAST_BYTES)}
    job = jobs.submit("true", file, stall_timeout_s=DOWNLOAD_STALL_S, max_attempts=1)
    with in_thread(SlowFiles(backend, pieces)):
        assert jobs.wait_for_end(job) == status, jobs.error(job)


def test_bytes_count_where_something_is_transferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.05)
    heard = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(progress.heard_by(heard.set))
        (tmp_path / "before").write_bytes(bytes(progress.LEAST_BYTES))
        assert not heard.wait(0.2), "nobody looks"
        stack.enter_context(progress.transferring())
        assert not heard.wait(0.2), "nothing moves"
        (tmp_path / "a").write_bytes(bytes(progress.LEAST_BYTES))
        assert heard.wait(HANGS_S)
    heard.clear()
    progress.advanced()
    assert not heard.is_set(), "nobody listens any more"
