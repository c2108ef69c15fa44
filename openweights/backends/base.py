"""The seam between the SDK and a store: domain verbs, not queries.

Every store implements `Backend`, and the tests in `tests/backends/contract.py` run on each. Verbs
marked *atomic* happen completely or not at all, also with many processes at once. All raise
`StoreUnavailableError` when the store cannot be reached; what else a verb raises is said with it.
Ids that do not exist raise `NotFoundError`; nested values that are no JSON, and moments without a
time zone, raise `InvalidInputError`. Numbers that JSON lacks (NaN, infinities) are stored as null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO, Literal, Protocol

from openweights.types import (
    AuditRecord,
    Claim,
    EventDraft,
    EventRecord,
    FileRecord,
    Garbage,
    Instruction,
    JobRecord,
    JobSpec,
    JobStatus,
    KeyRecord,
    MemberRecord,
    NewKey,
    QueuePlace,
    QueueState,
    RunRecord,
    RunStatus,
    SecretRecord,
    Sizes,
    WorkerRecord,
    WorkerSpec,
    WorkerStatus,
)


class Backend(Protocol):
    """A store of jobs, runs, events, files, logs and workers of one organization.

    Attributes:
        organization_id: Whose records these are; part of every job id and file id.
        heartbeat_s: How often a worker should call `heartbeat`.
        lease_s: A worker silent for longer loses its job.
        log_limit_bytes: Most bytes of a run's log. A worker leaves out the middle of a longer one.
        pace_s: Least time between two calls with which one writer appends events, or log text; what
            comes meanwhile is collected, because a call over a network has its price. 0 for none.
        liveness_fds: Descriptors that the processes of a worker must inherit: the store takes the
            worker for alive while one of them is open, so that a job is not given away while
            processes of its old run still exist. Empty for stores on another machine.
        team: What the store can do for a team; None for the store of one machine, whose workers
            start by themselves and which keeps no keys, members and secrets.
    """

    @property
    def organization_id(self) -> str: ...
    @property
    def heartbeat_s(self) -> float: ...
    @property
    def lease_s(self) -> float: ...
    @property
    def log_limit_bytes(self) -> int: ...
    @property
    def pace_s(self) -> float: ...
    @property
    def liveness_fds(self) -> tuple[int, ...]: ...
    @property
    def team(self) -> TeamStore | None: ...

    def now(self) -> datetime:
        """The store's clock, by which ages and timeouts count: that of a machine may be wrong."""
        ...

    def close(self) -> None:
        """Release connections. The object must not be used afterwards."""
        ...

    # ---- files

    def put_file(self, content: BinaryIO, purpose: str, filename: str) -> FileRecord:
        """Store a stream, in constant memory. Atomic.

        Its id is `<purpose>:file-<12 hex of sha256(content + organization)>`; equal content and
        purpose give the record that is already there. `filename` is reduced to its base name.

        Raises:
            InvalidInputError: `purpose` holds more than letters, digits, `_` and `-`.
        """
        ...

    def get_file(self, file_id: str) -> FileRecord: ...

    def open_file(self, file_id: str) -> BinaryIO:
        """The content, as a stream that the caller closes."""
        ...

    def list_files(
        self, *, purpose: str | None = None, limit: int | None = 100
    ) -> list[FileRecord]:
        """Newest first.

        Args:
            limit: None for all.
        """
        ...

    def delete_file(self, file_id: str) -> None:
        """Remove record and content. A file that is not there is no error."""
        ...

    # ---- jobs

    def submit_job(self, spec: JobSpec) -> JobRecord:
        """Create the job, or return or reset the one with its id. Atomic.

        A pending, in-progress or completed job is returned, with hardware, VRAM, image, cloud type,
        source bundle and `after` of a *pending* one synced to `spec`. A failed or canceled job goes
        back to pending with everything of `spec`, no outputs and `attempts` counted on (attempt
        numbers never repeat); its allowance of attempts starts anew, and so do the jobs that had
        failed because it had.

        Raises:
            InvalidInputError: `after` names no job, or one that waits for this one.
            InvalidStateError: A job of `after` has failed or was canceled.
        """
        ...

    def get_job(self, job_id: str) -> JobRecord: ...

    def list_jobs(
        self,
        *,
        statuses: Sequence[JobStatus] | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int | None = 100,
    ) -> list[JobRecord]:
        """Newest `updated_at` first, filtered before the limit.

        Args:
            where: Keeps jobs whose `params` contain this JSON: mappings by their keys, everything
                else by equality.
            limit: None for all.
        """
        ...

    def cancel_job(self, job_id: str) -> JobRecord:
        """`pending | in_progress -> canceled`. A canceled job stays as it is. Atomic.

        The run that it may have goes on until its worker has stopped it, and reported that with
        `finish_run`; a script's run, which has no worker, ends here. Jobs that wait for it fail, as
        they do when it fails.

        Raises:
            InvalidStateError: The job has completed or failed.
        """
        ...

    def restart_job(self, job_id: str) -> JobRecord:
        """`failed | canceled -> pending`, with a new allowance of attempts. Atomic.

        A run that is still being stopped is ended as canceled: its worker will find it fenced. Jobs
        that had failed because this one had are pending again, too.

        Raises:
            InvalidStateError: The job is pending, in progress or completed, or it is a script's, or
                a job of its `after` has failed or was canceled.
        """
        ...

    def set_timeout(self, job_id: str, timeout_at: datetime | None) -> JobRecord:
        """Move the moment at which the job is stopped."""
        ...

    def delete_job(self, job_id: str) -> None:
        """Remove a job that has ended, with its runs, their events and their logs. Atomic.

        The files that it names stay until `collect_garbage` finds that nobody else names them. A
        job that is not there is no error.

        Raises:
            InvalidStateError: It has not ended, or a job that has not ended names it.
        """
        ...

    def place_in_queue(self, job: JobRecord | None = None) -> QueuePlace:
        """What there is before a job, which need not be stored; before one that comes last, if none
        is given. One question, and the rows of a long queue stay in the store.
        """
        ...

    def queue_state(self) -> QueueState:
        """What holds for all jobs."""
        ...

    def set_paused(self, is_paused: bool) -> QueueState:
        """While the queue is paused `claim_job` gives out no new job; what runs goes on."""
        ...

    def set_max_duration(self, seconds: float | None) -> QueueState:
        """How long a run may take whose job does not say it; None for no limit."""
        ...

    def list_audit(self, *, target: str | None = None, limit: int = 100) -> list[AuditRecord]:
        """Who did what, newest first: changes of jobs, the queue, keys, members and secrets."""
        ...

    # ---- runs

    def get_run(self, run_id: int) -> RunRecord: ...

    def list_runs(
        self,
        *,
        job_id: str | None = None,
        worker_id: str | None = None,
        status: RunStatus | None = None,
        limit: int | None = None,
    ) -> list[RunRecord]:
        """Oldest first; with `limit`, the newest `limit` of them, still oldest first."""
        ...

    def start_script_run(self, spec: JobSpec) -> Claim:
        """A job of type `script` that runs outside any worker: in progress at once. Atomic.

        It has no lease and is never taken for lost; whoever started it calls `finish_run`.

        Raises:
            InvalidStateError: A job of that id exists.
        """
        ...

    def finish_run(
        self,
        run_id: int,
        attempt: int,
        status: Literal["completed", "failed", "canceled"],
        *,
        error: str | None = None,
        exit_code: int | None = None,
        cause: str | None = None,
    ) -> JobRecord:
        """End a run and its job, and store the job's outputs from the run's events. Atomic.

        A job that was canceled meanwhile stays canceled whatever `status` says. A failure that the
        job's `retry` allows ends the run alone: the job is pending again, for later. Finishing
        again with the same status is no error and changes nothing.

        Args:
            cause: `oom` or `hub`, where it is known why the job failed.

        Raises:
            FencedError: The attempt is not the job's current one, or was ended otherwise; nothing
                was written.
        """
        ...

    def release_run(
        self, run_id: int, attempt: int, *, reason: str, is_lost: bool = False
    ) -> JobRecord:
        """Give a job back: the run fails with `reason`, the job is pending again. Atomic.

        A released run uses up none of `max_attempts`, because its worker ended in good order; only
        runs whose worker was lost do, and with `is_lost` one that hung. A job that was canceled
        meanwhile stays canceled. Releasing again is no error and changes nothing.

        Raises:
            FencedError: As `finish_run`.
        """
        ...

    def touch_run(self, run_id: int) -> None:
        """The run's own sign of life, for as long as it neither logs nor prints anything."""
        ...

    # ---- events and logs

    def append_events(self, run_id: int, events: Sequence[EventDraft]) -> None:
        """Append in order; keys that the run already has are skipped. Atomic.

        A run that has ended still takes events, and they still count for its job's outputs, until
        the next attempt starts.

        Raises:
            FencedError: The run has been replaced by a newer attempt.
        """
        ...

    def list_events(
        self,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
        after: int = 0,
        type: str | None = None,
    ) -> Iterator[EventRecord]:
        """Events of a run, or of all runs of a job, with an id above `after`, ascending.

        Pages by itself, however many there are. Exactly one of `job_id` and `run_id` is given.

        Args:
            type: Only events whose data have this `type` (see `openweights.events`); found without
                reading the others.
        """
        ...

    def latest_values(
        self,
        keys: Sequence[str] | None = None,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
    ) -> dict[str, Any]:
        """Last value of each key over the events of a run, or of a job's last run.

        Args:
            keys: None for all. A key that no event has is left out.
        """
        ...

    def append_log(self, run_id: int, offset: int, data: bytes) -> None:
        """Write `data` at byte `offset` of the run's log.

        Sending the same bytes twice changes nothing.

        Raises:
            InvalidInputError: `offset` lies beyond the end of what is stored, or the log would be
                longer than `log_limit_bytes`.
        """
        ...

    def read_log(self, run_id: int, offset: int = 0, limit: int = 1 << 20) -> bytes:
        """At most `limit` bytes, and at most 8 MiB, from `offset`; empty at the end."""
        ...

    # ---- what is kept

    def collect_garbage(self, keep_s: float, *, dry_run: bool = False) -> Garbage:
        """Remove what nobody has needed for `keep_s`, an hour at least.

        Files that no job names and no event names and that were not put since, and what killed
        processes have left of files; checkpoints of jobs that ended before, but for those that a
        job keeps, or that belong to a job which is named by one that has not ended; logs of runs
        that ended before, of which a line is left that says so. Safe beside workers and clients at
        work: what a submission names meanwhile stays, or it is refused.

        Args:
            dry_run: Only say what would go.
        """
        ...

    def sizes(self) -> Sizes:
        """What the store takes up; in a project the organization, but for the whole database."""
        ...

    # ---- workers

    def register_worker(self, worker: WorkerSpec) -> WorkerRecord:
        """Create or replace the worker's row, with status `active` and a fresh ping. Atomic.

        Runs that a worker of that id held before are lost.

        Raises:
            InvalidStateError: The store knows that another process of that id is alive.
        """
        ...

    def list_workers(self, *, statuses: Sequence[WorkerStatus] | None = None) -> list[WorkerRecord]:
        """Newest first. A worker that is known to be gone is listed as `terminated`."""
        ...

    def set_worker_status(self, worker_id: str, status: WorkerStatus) -> WorkerRecord:
        """`shutdown` asks the worker to end, `terminated` records that it has. Atomic.

        What a terminated worker held is lost. It stays terminated, whatever is set afterwards,
        until it registers again.
        """
        ...

    def claim_job(self, worker_id: str) -> Claim | None:
        """Give the worker the best pending job that fits it, or the job that it already holds.

        Order: priority, then oldest; jobs whose `after` have not all completed, whose `not_before`
        has not come, or of whose label `max_running` run, are passed over. After `MOST_QUESTIONS`
        questions on end a worker takes another job, if one waits. First, runs whose lease
        has expired or whose worker is known to be gone are ended as failed and their jobs return to
        pending, or fail once `max_attempts` runs were lost. Creates the run with the next attempt
        number and takes the lease. A worker that is not `active`, and every worker while the queue
        is paused, gets no new job. Atomic.
        """
        ...

    def heartbeat(self, worker_id: str, run_id: int | None = None) -> Instruction:
        """Record that the worker lives, renew the lease of its run, and say what to do about it.

        An expired lease is won back as long as nobody else has taken the job. The answers, of which
        the first that applies is given:

        `fenced`: the run has ended, or is no longer the current attempt. `cancel`: the job was
        canceled. `timeout`: its moment has passed, the run has taken too long, or its money is
        spent. `stalled`: the run has been quiet for too long. `shutdown`: the worker should end.
        `continue`.
        """
        ...


class TeamStore(Backend, Protocol):
    """A store of a team: its members, their keys, its secrets and what it spends. Who may do what
    is the store's to say; what a key may not do raises `ConfigurationError`.

    Attributes:
        url: Where it is.
        identity: What it says of the key in use: its organization, role and worker, and the timing.
    """

    url: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def rename_organization(self, name: str) -> None: ...

    def retention(self) -> tuple[int, float | None]:
        """MB of a run's log at most, and after how many days what nobody needs goes by itself; None
        for never.
        """
        ...

    def set_retention(self, log_limit_mb: int, keep_days: float | None) -> None:
        """See `retention`. Whoever is at work hears of it when they start again."""
        ...

    # ---- members and keys

    def list_members(self) -> list[MemberRecord]: ...

    def add_member(self, email: str, role: str) -> MemberRecord:
        """A new member; who is one already gets the role."""
        ...

    def remove_member(self, member_id: str) -> None:
        """The member's keys are dead from then on."""
        ...

    def create_key(
        self,
        name: str,
        role: str,
        *,
        expires_at: datetime | None = None,
        worker_id: str | None = None,
        budget_usd: float | None = None,
        member_id: str | None = None,
    ) -> NewKey:
        """Make a key; for the role `worker` it may be bound to one worker id.

        Args:
            member_id: Whose it is; None for the one whose key asks.
        """
        ...

    def list_keys(self) -> list[KeyRecord]: ...

    def revoke_key(self, key_id: str) -> None:
        """The key counts no more, at once. Again changes nothing."""
        ...

    def set_budget(self, key_id: str, usd: float | None) -> None:
        """What the jobs of a key may cost in its life; None for no limit."""
        ...

    def cost_report(self, *, limit: int = 100, offset: int = 0) -> dict[str, Any]:
        """What was spent: in all, by job, worker and key; `limit` jobs and workers of each."""
        ...

    def market(self) -> dict[str, Any]:
        """Prices and stock as the manager has last heard of them; empty without a manager."""
        ...

    # ---- secrets, as sealed boxes

    def secrets_key(self) -> str | None:
        """The public key that secrets are sealed with; None before an admin has made one."""
        ...

    def set_secrets_key(self, public_key: str) -> None:
        """Raises InvalidStateError while there are secrets that only the present key opens."""
        ...

    def set_secret(self, name: str, sealed: str) -> None: ...

    def delete_secret(self, name: str) -> bool:
        """Whether there was one."""
        ...

    def list_secrets(self) -> list[SecretRecord]: ...

    def job_secrets(self, run_id: int) -> dict[str, str]:
        """Sealed boxes of the secrets that the run's job names, for the worker that holds it."""
        ...
