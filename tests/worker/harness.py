"""A real store, jobs that are shell scripts, and workers in this process or in processes of their
own.
"""

from __future__ import annotations

import threading
from io import BytesIO
from typing import Any

from openweights import hardware
from openweights.backends.base import Backend
from openweights.errors import StoreUnavailableError
from openweights.settings import Settings
from openweights.types import JobRecord, JobSpec
from openweights.worker.main import Worker
from openweights.worker.shutdown import Shutdown
from tests.waiting import HANGS_S, wait_until


class Jobs:
    """Submits scripts and waits for what becomes of them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._count = 0

    def submit(self, script: str, files: dict[str, bytes] | None = None, **spec: Any) -> JobRecord:
        mounted = {
            target: self.backend.put_file(BytesIO(content), "mount", "file").id
            for target, content in (files or {}).items()
        }
        self._count += 1
        params = {"validated_params": {}, "mounted_files": mounted}
        return self.backend.submit_job(
            JobSpec(f"job-{self._count}", "custom", script, params, **spec)
        )

    def status(self, job: JobRecord) -> str:
        return self.backend.get_job(job.id).status

    def log(self, job: JobRecord) -> bytes:
        runs = self.backend.list_runs(job_id=job.id)
        return self.backend.read_log(runs[-1].id) if runs else b""

    def events(self, job: JobRecord) -> list[dict[str, Any]]:
        return [dict(event.data) for event in self.backend.list_events(job_id=job.id)]

    def attempts(self, job: JobRecord) -> int:
        return self.backend.get_job(job.id).attempts

    def error(self, job: JobRecord) -> str | None:
        return self.backend.list_runs(job_id=job.id)[-1].error

    def wait_for_log(self, job: JobRecord, text: bytes) -> None:
        wait_until(lambda: text in self.log(job), f"{text!r} in the log")

    def wait_for_end(self, job: JobRecord) -> str:
        wait_until(lambda: self.status(job) not in ("pending", "in_progress"), "the job's end")
        return self.status(job)


class Outage:
    """A store that can go away, in whole or by verb: ten lines around a real one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.away: bool | set[str] = False
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        away = self.away if isinstance(self.away, bool) else name in self.away
        if away and callable(getattr(self._backend, name)):
            self.refused.append(name)
            raise StoreUnavailableError("switched off by the test")
        return getattr(self._backend, name)


class WorkerThread:
    """A worker in this process, on any store."""

    def __init__(self, settings: Settings, backend: Any, found: hardware.Hardware) -> None:
        self.shutdown = Shutdown(settings.cancel_grace_s)
        self.worker = Worker(settings, backend, found, self.shutdown)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.exit_code = self.worker.run(once=False, idle_s=None)

    def __enter__(self) -> WorkerThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown.hurry_up()
        self.join()

    def join(self, timeout_s: float = HANGS_S) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
