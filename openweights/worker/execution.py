"""One job, from the claim to its end."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

from openweights import progress
from openweights.backends.base import Backend
from openweights.credentials import handed_over
from openweights.errors import FencedError, OpenWeightsError, StoreUnavailableError
from openweights.events import IdleGPU, Stage, TypedEvent
from openweights.hardware import Hardware
from openweights.settings import Settings
from openweights.types import SERVED, Claim, EventDraft, Instruction, JobRecord
from openweights.worker import gpu_watch
from openweights.worker.causes import advice, cause_of, oom_kills
from openweights.worker.folder import SPOOL_VARIABLE, RunFolder, mount, unpack
from openweights.worker.heartbeat import Heartbeat
from openweights.worker.job_secrets import open_secrets, secret_names
from openweights.worker.log_pump import LogPump
from openweights.worker.process import GuardedProcess, ProcessEnd
from openweights.worker.redaction import Redactor, secret_values
from openweights.worker.results import (
    LARGE,
    collect_uploads,
    drop_checkpoints,
    replay_events,
    upload_bytes,
)
from openweights.worker.shutdown import Shutdown, persist
from openweights.worker.verdict import (
    HUNG,
    TERMINATED,
    Verdict,
    judge,
    last_said,
    one_line,
    shorten,
    words_of,
)

logger = logging.getLogger(__name__)

NOTICE_S = 0.5
# Of two instructions about one run the later in this list counts.
_WEIGHT: tuple[Instruction, ...] = (
    *("continue", "shutdown", "stalled", "timeout", "cancel", "fenced"),
)


@dataclass(frozen=True, slots=True)
class Host:
    """What an execution needs of its worker.

    Attributes:
        env: The worker's environment, which the job gets with some additions.
        runs: Folder in which the folders of runs are made.
    """

    backend: Backend
    settings: Settings
    env: Mapping[str, str]
    runs: Path
    hardware: Hardware
    shutdown: Shutdown
    heartbeat: Heartbeat


def execute(claim: Claim, host: Host) -> None:
    """Run the claimed job and report. Whatever is wrong with the job ends as its failure, not as an
    exception.

    Raises:
        OpenWeightsError: The store took neither the result nor a failure.
    """
    control = RunControl()
    with (
        host.heartbeat.watching(claim.run.id, control.instruct),
        host.shutdown.reaching(control),
    ):
        _Execution(claim, host, control).run()


def runs_folder(settings: Settings) -> Path:
    """Where the folders of runs are made: beside the embedded store, or apart for each project,
    because runs are numbered by their store.
    """
    if not settings.supabase_url:
        return settings.home / "runs"
    digest = hashlib.sha256(settings.supabase_url.rstrip("/").encode()).hexdigest()
    return settings.home / f"runs-{digest[:8]}"


class RunControl:
    """Takes instructions about one run from other threads to its process, before or after it
    starts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: GuardedProcess | None = None
        self._instruction: Instruction = "continue"
        self._instructed_at = time.monotonic()
        self._is_hurried = False

    @property
    def instruction(self) -> Instruction:
        return self._instruction

    @property
    def age_s(self) -> float:
        """Since when that is the instruction."""
        return time.monotonic() - self._instructed_at

    def instruct(self, instruction: Instruction) -> None:
        """Stop the job for the reason given; the same again changes nothing."""
        with self._lock:
            if _WEIGHT.index(instruction) <= _WEIGHT.index(self._instruction):
                return
            self._instruction, self._instructed_at = instruction, time.monotonic()
            self._apply()

    def instruct_shutdown(self) -> None:
        self.instruct("shutdown")

    def kill(self) -> None:
        """No grace (any longer), also for a process that is attached later."""
        with self._lock:
            self._is_hurried = True
            self._apply()

    def attach(self, process: GuardedProcess) -> None:
        """From now on instructions reach `process`, and so does one that came before."""
        with self._lock:
            self._process = process
            self._apply()

    def _apply(self) -> None:
        if self._process is None:
            return
        if self._is_hurried or self._instruction == "fenced":
            self._process.kill()
        elif self._instruction != "continue":
            self._process.stop()


class _Execution:
    def __init__(self, claim: Claim, host: Host, control: RunControl) -> None:
        self._job, self._run = claim.job, claim.run
        self._host = host
        self._control = control
        self._hurry = host.shutdown.hurry
        self._redactor = Redactor(secret_values(host.env))
        self._log = LogPump(host.backend, claim.run.id, self._redactor, self._hurry)
        self._folder: RunFolder | None = None
        self._hang: str | None = None

    def run(self) -> None:
        logger.info("job %s: run %s, attempt %s", self._job.id, self._run.id, self._run.attempt)
        try:
            verdict = self._reach_verdict()
            logger.info("job %s: %s %s", self._job.id, verdict.outcome, verdict.reason or "")
            self._report(verdict)
        except FencedError as error:
            logger.warning("job %s: another attempt has taken over: %s", self._job.id, error)
        except StoreUnavailableError as error:
            logger.error("job %s: gave up on the store: %s", self._job.id, error)
        finally:
            self._log.discard()
            if self._folder is not None:
                self._folder.remove()

    def _reach_verdict(self) -> Verdict:
        try:
            self._folder = folder = RunFolder(self._host.runs, self._run.id)
            with progress.heard_by(self._log.say_alive), progress.transferring():
                self._fill(folder)
            killed_before = oom_kills()
            end = self._run_job(folder)
            verdict = judge(self._instruction_at(end), end, last_said(self._log.last_lines()))
            verdict = self._with_cause(verdict, oom_kills() - killed_before)
            if verdict.outcome != "fenced":
                goes_on = verdict.outcome in ("released", "lost")
                self._deliver(folder, with_files=not goes_on)
        except (FencedError, StoreUnavailableError):
            raise
        except OpenWeightsError as error:
            logger.error("job %s cannot run: %s", self._job.id, error)
            return Verdict("failed", one_line(error))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one job fails that job only
            logger.exception("job %s failed in the worker's hands", self._job.id)
            return Verdict("failed", one_line(error))
        return verdict

    def _with_cause(self, verdict: Verdict, killed: int) -> Verdict:
        """Why it failed, where that is known; for lack of memory with what to lower."""
        if verdict.reason == HUNG:
            quiet_s = self._job.stall_timeout_s or 0
            hang = self._hang or f"no log line, event or sign of life for {quiet_s:g} s"
            return replace(verdict, reason=f"stopped: {hang}")
        if verdict.outcome != "failed" or verdict.exit_code is None:
            return verdict
        cause = cause_of(verdict.exit_code, self._log.last_lines(), oom_kills=killed)
        if cause != "oom":
            return replace(verdict, cause=cause)
        params = self._job.validated_params
        reason = f"out of memory: {advice(params)} ({verdict.reason})"
        return replace(verdict, cause=cause, reason=shorten(reason))

    def _fill(self, folder: RunFolder) -> None:
        """Fetch the job's files; each from its beginning again if the store goes away in it.

        Leaves off once the job is to stop: a machine that is taken back gives no time for more.
        """
        if self._job.bundle_file:
            self._fetch(self._job.bundle_file, lambda content: unpack(content, folder.path))
        for target, file_id in sorted(self._job.params.get("mounted_files", {}).items()):
            if self._control.instruction != "continue":
                return
            self._fetch(file_id, partial(mount, folder=folder.path, target=target))

    def _fetch(self, file_id: str, use: Callable[[BinaryIO], None]) -> None:
        def fetch() -> None:
            with self._host.backend.open_file(file_id) as content:
                use(content)

        self._persist(fetch)

    def _run_job(self, folder: RunFolder) -> ProcessEnd:
        if self._control.instruction != "continue":
            return ProcessEnd(None, was_stopped=True)
        secrets, backend = self._open_secrets(), self._host.backend
        for warning in shortfalls(self._job, self._host.hardware):
            self._log.note(warning)
        process = GuardedProcess(
            self._job.script,
            folder=folder.path,
            env=job_env(self._host, folder, self._run.id, secrets),
            grace_s=self._host.settings.cancel_grace_s,
            held_fds=(*backend.liveness_fds, folder.lock_fd),
            marker=folder.marker,
            # On one machine the lease is not given away while the job's folder is in use.
            silence_s=0.0 if backend.team is None else backend.lease_s,
        )
        try:
            self._control.attach(process)
            self._log.attach(process.output_fd)
            with self._watching_gpus():
                return process.wait()
        finally:
            process.kill()
            self._log.drain()
            process.close()

    @contextlib.contextmanager
    def _watching_gpus(self) -> Iterator[None]:
        """A pod whose GPUs idle is not paid for for ever; nobody pays for a machine of one's own by
        the hour, and a server waits for whom it serves.
        """
        pod, gpus = self._host.settings.pod, self._host.hardware.gpu_count
        limit_s = 60 * pod.idle_gpu_minutes
        if pod.worker_id is None or not gpus or not limit_s or self._job.type == SERVED:
            yield
            return
        with gpu_watch.watching(self._host.env, limit_s, self._warn_of_idleness, self._end_idle):
            yield

    def _warn_of_idleness(self, left_s: float) -> None:
        message = (
            f"the GPUs have worked less than {gpu_watch.LEAST_PERCENT} % of the time for a while: "
            f"in {left_s / 60:.0f} minutes the job is ended, unless they work again"
        )
        logger.warning("job %s: %s", self._job.id, message)
        self._tell(IdleGPU(message=message, left_s=left_s))

    def _tell(self, event: TypedEvent) -> None:
        """Log an event that nobody misses if it does not arrive."""
        with contextlib.suppress(OpenWeightsError):
            draft = EventDraft(uuid.uuid4().hex, event.data(), datetime.now(UTC))
            self._host.backend.append_events(self._run.id, [draft])

    def _end_idle(self) -> None:
        minutes = self._host.settings.pod.idle_gpu_minutes
        share = f"less than {gpu_watch.LEAST_PERCENT} %"
        self._hang = f"its GPUs worked {share} for {minutes:g} minutes"
        self._control.instruct("stalled")
        self._host.shutdown.request()

    def _open_secrets(self) -> dict[str, str]:
        """Those that the job names or was handed; its log shows them no more than those of this
        worker.
        """
        host, names = self._host, secret_names(self._job.params)
        handed: dict[str, str] = {}
        if host.backend.team is None:
            handed = handed_over(host.settings.home, self._job.id)
        env = {**host.env, **handed}
        secrets = persist(
            lambda: open_secrets(names, self._run.id, host.backend, host.settings, env),
            give_up=self._hurry,
        )
        secrets = {**handed, **secrets}
        self._redactor.add(secret_values(secrets, names))
        return secrets

    def _instruction_at(self, end: ProcessEnd) -> Instruction:
        # Whoever stops a whole machine or container signals all its processes: the job may be gone
        # before the worker's own signal has been noticed.
        if end.exit_code in TERMINATED:
            self._host.shutdown.requested.wait(NOTICE_S)
        instruction = self._control.instruction
        if instruction == "continue" and self._host.shutdown.requested.is_set():
            return "shutdown"
        return instruction

    def _deliver(self, folder: RunFolder, *, with_files: bool) -> None:
        backend, run_id = self._host.backend, self._run.id
        folder.check_is_here()
        replay_events(backend, run_id, folder.spool, self._hurry)
        if with_files:
            uploads, note = folder.uploads, self._log.note
            if (size := upload_bytes(uploads, folder.path)) >= LARGE:
                self._tell(Stage(doing=f"storing the results ({size / 1e6:.0f} MB)"))
            hurry, is_unwanted = self._hurry, self._is_unwanted
            collect_uploads(backend, run_id, uploads, folder.path, hurry, note, is_unwanted)

    def _is_unwanted(self) -> bool:
        """Whether nobody waits for more of its results: those of a canceled job have the time that
        it has to end.
        """
        grace_s = self._host.settings.cancel_grace_s
        canceled = self._control.instruction == "cancel" and self._control.age_s > grace_s
        return canceled or self._control.instruction == "fenced"

    def _report(self, verdict: Verdict) -> None:
        if verdict.outcome == "fenced":
            return
        if verdict.reason is not None:
            said = words_of(last_said(self._log.last_lines()))  # which stand right above
            reason = verdict.reason.replace(f": {said}", "", 1) if said else verdict.reason
            self._log.note(f"{verdict.outcome}: {reason}")
        self._log.finish()
        backend, run, reason = self._host.backend, self._run, verdict.reason
        if verdict.outcome in ("released", "lost"):
            why, is_lost = reason or "released", verdict.outcome == "lost"
            self._persist(
                lambda: backend.release_run(run.id, run.attempt, reason=why, is_lost=is_lost)
            )
            return
        status = verdict.outcome
        if status == "failed":
            draft = EventDraft(uuid.uuid4().hex, {"error": reason}, datetime.now(UTC))
            self._persist(lambda: backend.append_events(run.id, [draft]))
        self._persist(
            lambda: backend.finish_run(
                run.id,
                run.attempt,
                status,
                error=reason,
                exit_code=verdict.exit_code,
                cause=verdict.cause,
            )
        )
        if status == "completed":
            self._persist(lambda: drop_checkpoints(backend, self._job.id))

    def _persist(self, call: Callable[[], object]) -> None:
        persist(call, give_up=self._hurry)


def shortfalls(job: JobRecord, hardware: Hardware) -> list[str]:
    """What the job asked for and this machine lacks, for its log; it runs all the same."""
    found: list[str] = []
    if job.requires_vram_gb > 0 and hardware.gpu_count == 0:
        # How much it would need is a guess for GPUs, at times by a name alone.
        found.append("this machine has no GPU: the job computes on its CPU")
    elif job.requires_vram_gb > hardware.vram_gb:
        found.append(
            f"this job asks for {job.requires_vram_gb} GB of GPU memory and this machine has "
            f"{hardware.vram_gb} ({hardware.hardware_type}): it runs anyway, and may not fit"
        )
    if job.allowed_hardware and hardware.hardware_type not in job.allowed_hardware:
        asked = " or ".join(job.allowed_hardware)
        found.append(f"this job asks for {asked}; it runs on {hardware.hardware_type} anyway")
    return found


def job_env(
    host: Host, folder: RunFolder, run_id: int, secrets: Mapping[str, str]
) -> dict[str, str]:
    """The worker's environment and the job's secrets, with the job's code first and `python` being
    this Python.
    """
    env = {**host.env, **secrets}
    env["PYTHONPATH"] = _joined(str(folder.path), env.get("PYTHONPATH"))
    env["PATH"] = _joined(os.path.dirname(sys.executable), env.get("PATH", os.defpath))
    env["PYTHONUNBUFFERED"] = "1"
    # OpenMP's threads spin for milliseconds while they wait. On cores that something else uses too,
    # training was 20 times slower so. Not spinning at all makes two free cores as slow as one, so
    # they spin for a moment only.
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", "20000")
    env["OPENWEIGHTS_RUN_ID"] = str(run_id)
    env["OPENWEIGHTS_HOME"] = str(host.settings.home)
    env[SPOOL_VARIABLE] = str(folder.spool)
    env["N_GPUS"] = str(host.hardware.gpu_count)
    return env


def _joined(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first
