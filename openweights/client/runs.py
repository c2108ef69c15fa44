"""`ow.runs`, and `ow.run`: the run that this process belongs to."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, cast, get_args

from openweights.arguments import as_path, check_known, check_limit, check_text, check_whole
from openweights.client.event_json import event_data
from openweights.client.event_sender import EventSender, at_exit, replay_spool
from openweights.client.results import LOG_PREFIX, write_log, write_results
from openweights.errors import FencedError, InvalidStateError, PlatformError, in_a_line
from openweights.types import EventRecord, JobSpec, RunRecord, RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openweights.backends.base import Backend
    from openweights.client import OpenWeights

EVENT_FILE_PURPOSE = "event"
HEARTBEAT_S = 30.0

# Held while an event is written down or a sender is exchanged, so that no event meets a sender that
# is closed; and during a fork, so that the child does not find it held for ever.
_sending = threading.RLock()
os.register_at_fork(
    before=_sending.acquire, after_in_parent=_sending.release, after_in_child=_sending.release
)


class Run:
    """One attempt at a job. Fields of its record are attributes, and can be read by indexing:
    `run["status"]`.
    """

    job_id: str
    worker_id: str | None
    attempt: int
    status: RunStatus
    created_at: datetime
    ended_at: datetime | None
    error: str | None
    log_bytes: int
    is_given_back: bool

    def __init__(self, ow: OpenWeights, run_id: int, record: RunRecord | None = None) -> None:
        self._ow = ow
        self.id = run_id
        self._record = record
        self._sender: EventSender | None = None
        self._said_at = -HEARTBEAT_S
        self._spool: Path | None = ow.settings.spool_dir

    def __getattr__(self, name: str) -> Any:
        # Called for what is no ordinary attribute: the fields of the record, which is read on first
        # use.
        if name.startswith("_") or name not in RunRecord.__slots__:
            raise AttributeError(f"a run has no {name!r}")
        return getattr(self.record, name)

    def __getitem__(self, name: str) -> Any:
        if not isinstance(cast("object", name), str) or name not in RunRecord.__slots__:
            raise KeyError(name)
        return getattr(self.record, name)

    def __repr__(self) -> str:
        return (
            f"Run({self.id})"
            if self._record is None
            else f"Run({self.id}, {self.record.status_word})"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *RunRecord.__slots__})

    @property
    def record(self) -> RunRecord:
        """What the store said of it last; see `refresh`."""
        if self._record is None:
            self._record = self._ow.backend.get_run(self.id)
        return self._record

    def refresh(self) -> Run:
        """Read the run again, in place."""
        self._record = self._ow.backend.get_run(self.id)
        return self

    @property
    def log_file(self) -> str:
        """Its log as a file id, for `ow.files.content` and `ow.files.download`."""
        return f"{LOG_PREFIX}{self.id}"

    @property
    def events(self) -> list[EventRecord]:
        """All that it has logged, oldest first."""
        return self._ow.events.list(run_id=self.id)

    def logs(self) -> str:
        """What it has printed so far."""
        return b"".join(self._ow.iterate_log(self.id)).decode(errors="replace")

    def log(self, data: Mapping[str, Any], file: str | Path | BinaryIO | None = None) -> None:
        """Log an event, without waiting for the store.

        Args:
            data: Free; conventional keys are step, tag, type, loss, file, path, error.
            file: A file to keep with the event. It is uploaded before this returns, and its id
                becomes `data["file"]`.

        Raises:
            InvalidInputError: A value is no JSON; the message names its key.
        """
        if file is not None:
            event_data(data)  # refused before anything is stored
            stored = self._ow.files.create(file, EVENT_FILE_PURPOSE)
            data = {**data, "file": stored["id"]}
        backend = self._ow.backend
        with _sending:
            self._open_sender(backend).log(data)

    def heartbeat(self) -> None:
        """Say that the job lives, where `stall_timeout_s` would take its silence for a hang.

        Printed lines and events say it, too, and so does whatever calls
        `openweights.progress.advanced`: the engines that generate do for each token. It may be
        called at every step, and from any thread: the store hears it twice a minute, in the
        background, and one that is away is no matter.
        """
        if time.monotonic() - self._said_at >= HEARTBEAT_S:
            self._said_at = time.monotonic()
            backend = self._ow.backend
            # A process that ends, or a full disk: what has no life to tell is found by other means.
            with _sending, contextlib.suppress(InvalidStateError, OSError):
                self._open_sender(backend).tell_life()

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all that this process has logged is stored; says whether it is."""
        sender = self._sender
        # (That of a forked child is its parent's until it logs something itself.)
        return sender is None or sender.pid != os.getpid() or sender.flush(timeout)

    def close(self) -> None:
        """Send what this process has logged, and stop sending. The run itself goes on, and what is
        logged afterwards is sent, too.
        """
        with _sending:
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def update(
        self, status: Literal["completed", "failed", "canceled"], error: str | None = None
    ) -> Run:
        """End the run, and its job, with that status. Runs that a worker holds are ended by it.

        Raises:
            FencedError: A newer attempt has replaced the run, or it was ended otherwise.
        """
        check_known("status", status, ("completed", "failed", "canceled"))
        if error is not None:
            check_text("error", error, "say in a line why it failed")
        self.flush()
        self._ow.backend.finish_run(self.id, self.attempt, status, error=error)
        return self.refresh()

    def download(self, target_dir: str | Path) -> list[Path]:
        """Write its log, and each result file, at its path, into `target_dir`. The log is `log.txt`
        of a job's last run, and else `log-attempt-1.txt` and so on.

        Returns:
            What was written.

        Raises:
            InvalidInputError: A path leaves `target_dir`; nothing was written.
        """
        target = as_path("target_dir", target_dir)
        files = write_results(self._ow.backend, self.events, target)
        last = self._ow.runs.list(job_id=self.record.job_id, limit=1)[-1]
        is_last = last.id == self.id
        return files + write_log(self._ow.backend, self.record, target, files, is_last=is_last)

    def _open_sender(self, backend: Backend) -> EventSender:
        sender = self._sender
        if sender is None or sender.is_closed or sender.pid != os.getpid():
            sender = self._sender = EventSender(backend, self.id, self._spool)
        return sender


class ScriptRun(Run):
    """The run of a script that no worker started; it ends with the process, as failed after an
    uncaught exception or a `sys.exit` with an error. Of the command line only the script's name is
    kept: its arguments may be secrets.

    A `sys.exit` that something has caught is forgotten with the next event; `raise SystemExit`
    cannot be seen, and counts as a good end.
    """

    def __init__(self, ow: OpenWeights) -> None:
        spec = JobSpec(
            id=f"sjob-{uuid.uuid4().hex[:12]}",
            type="script",
            script=shlex.quote(os.path.basename(sys.argv[0]) or "python"),
            params={"validated_params": {}, "mounted_files": {}, "cloud_type": "SECURE"},
        )
        record = ow.backend.start_script_run(spec).run
        super().__init__(ow, record.id, record)
        self._pid = os.getpid()
        self._has_ended = False
        # Also of its forked children, which may be killed with events that nobody has sent.
        self._spool = Path(tempfile.mkdtemp(prefix="openweights-spool-"))
        self._error: str | None = None
        self._next_hook, self._next_exit = sys.excepthook, sys.exit
        sys.excepthook, sys.exit = self._on_exception, self._on_exit
        at_exit(self._end)

    def log(self, data: Mapping[str, Any], file: str | Path | BinaryIO | None = None) -> None:
        self._error = None
        super().log(data, file)

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not hasattr(sys, "ps1"):  # an interactive session goes on
            self._error = in_a_line(error)
        self._next_hook(kind, error, traceback)

    def _on_exit(self, code: str | int | None = None, /) -> NoReturn:
        # In another thread it ends that thread.
        if threading.current_thread() is threading.main_thread():
            self._error = in_a_line(SystemExit(code)) if code else None
        self._next_exit(code)
        raise AssertionError("sys.exit has returned")

    def _end(self) -> None:
        if os.getpid() != self._pid or self._has_ended:
            return
        self._has_ended = True
        self.close()
        self._send_the_rest()
        # Put back what was there, unless somebody has put something else there since.
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._next_hook
        if sys.exit == self._on_exit:
            sys.exit = self._next_exit
        status = "completed" if self._error is None else "failed"
        try:
            self._ow.backend.finish_run(self.id, self.attempt, status, error=self._error)
        except (FencedError, PlatformError):
            # Ended by hand, or the store is away: there is nobody left to tell.
            return

    def _send_the_rest(self) -> None:
        assert self._spool is not None
        try:
            replay_spool(self._ow.backend, self.id, self._spool)
        except PlatformError:
            return  # the sender has said where they are
        shutil.rmtree(self._spool, ignore_errors=True)


class RunCollection:
    """The runs of the organization's jobs."""

    def __init__(self, ow: OpenWeights) -> None:
        self._ow = ow

    def list(
        self,
        job_id: str | None = None,
        worker_id: str | None = None,
        limit: int | None = 10,
        status: RunStatus | None = None,
    ) -> list[Run]:
        """The newest `limit` runs (None: all), oldest first."""
        for name, value in (("job_id", job_id), ("worker_id", worker_id)):
            if value is not None:
                check_text(name, value, "give an id, or leave it out for all")
        if status is not None:
            check_known("status", status, get_args(RunStatus))
        limit = check_limit(limit)
        records = self._ow.backend.list_runs(
            job_id=job_id, worker_id=worker_id, status=status, limit=limit
        )
        return [Run(self._ow, record.id, record) for record in records]

    def retrieve(self, run_id: int) -> Run:
        """The run of that id.

        Raises:
            NotFoundError: There is none.
        """
        run_id = check_whole("run_id", run_id)
        return Run(self._ow, run_id, self._ow.backend.get_run(run_id))
