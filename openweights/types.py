"""The records that travel between a store and everything above it.

Plain frozen dataclasses: no I/O, no imports beyond the standard library, so that every layer may
use them.
Moments are timezone-aware UTC `datetime`s and end in `_at`; durations end in `_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, cast

JobStatus = Literal["pending", "in_progress", "completed", "failed", "canceled"]
RunStatus = Literal["in_progress", "completed", "failed", "canceled"]
WorkerStatus = Literal["starting", "active", "shutdown", "terminated"]
CloudType = Literal["SECURE", "COMMUNITY", "ALL"]
JobType = Literal["fine-tuning", "inference", "script", "api", "custom"]

# What a worker that started by itself on this machine takes: jobs that end, one after the other, or
# deployed models, which are served beside them, or questions, which are answered beside them.
Lane = Literal["jobs", "servers", "questions"]

# What a worker must do about the run that it holds, as answered to its heartbeat.
Instruction = Literal["continue", "cancel", "timeout", "stalled", "shutdown", "fenced"]

JOB_STATUSES: tuple[JobStatus, ...] = ("pending", "in_progress", "completed", "failed", "canceled")
SERVED: JobType = "api"
SERVED_PORT = 8000  # on a pod, behind its provider's proxy
SERVING_PREFIX = "server-"  # ids of workers of the lane "servers" begin so
ANSWERING_PREFIX = "answers-"  # and those of the lane "questions" so
# An inference of at least this priority is a question that a person waits for. Workers take it
# first, but after so many of them on end another job, if one waits.
QUESTION_PRIORITY = 1000
MOST_QUESTIONS = 10
ENDED: frozenset[str] = frozenset({"completed", "failed", "canceled"})
CLOUD_TYPES: tuple[CloudType, ...] = ("SECURE", "COMMUNITY", "ALL")


@dataclass(frozen=True, slots=True)
class Retry:
    """Which of its own failures a job is tried again after.

    Attributes:
        max: Retries in all.
        backoff_s: Pause before the first; it doubles with each, up to a day.
        on: `oom` (no memory left), `hub` (Hugging Face could not be reached), `exit:N` (the command
            ended with that code), or `any` of them.
    """

    max: int
    backoff_s: float = 60.0
    on: tuple[str, ...] = ("oom", "hub")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a client submits. The id is computed by the client from what the job *does*.

    Attributes:
        id: `<prefix>-<12 hex>[-suffix]`.
        type: Kind of job, for listing only.
        script: Shell command that runs in the job's folder.
        params: `{"validated_params": {…}, "mounted_files": {target: file id}, "cloud_type": …}`.
        model: Model that the job loads, when it has one.
        docker_image: Image whose workers may take the job.
        requires_vram_gb: GPU memory needed in all, in GiB; 0 for none.
        allowed_hardware: Hardware strings such as "2x H100S", or None for any that fits.
        bundle_file: File id of the zip with the client's own package, unpacked into the job's
            folder.
        priority: Higher is taken first.
        max_attempts: Runs that may lose their worker before the job fails.
        timeout_at: The job is stopped at this moment.
        max_cost_usd: The job is stopped once its runs have cost so much; counts where pods have
            prices, and is not kept by the store on this machine.
        after: Ids of jobs that must complete first: no worker takes the job before, and when one of
            them fails or is canceled, it fails, too.
        not_before: No worker takes the job earlier. After a failure that is retried, when it is.
        label: What jobs have in common that `max_running` counts.
        max_running: It begins only while fewer jobs with its label run.
        max_duration_s: A run that takes longer is stopped, and the job fails; None for what the
            organization says (`set_max_duration`).
        stall_timeout_s: A run without a log line, an event or a `touch_run` for so long counts as
            lost; None for never.
        retry: None to fail at the first failure.
        max_usd_per_hour: No pod that costs more takes the job; as `max_cost_usd`, not kept by the
            store on this machine.
    """

    id: str
    type: JobType
    script: str
    params: Mapping[str, Any]
    model: str | None = None
    docker_image: str = ""
    requires_vram_gb: int = 0
    allowed_hardware: tuple[str, ...] | None = None
    bundle_file: str | None = None
    priority: int = 0
    max_attempts: int = 3
    timeout_at: datetime | None = None
    max_cost_usd: float | None = None
    after: tuple[str, ...] = ()
    not_before: datetime | None = None
    label: str | None = None
    max_running: int | None = None
    max_duration_s: float | None = None
    stall_timeout_s: float | None = None
    retry: Retry | None = None
    max_usd_per_hour: float | None = None

    @property
    def validated_params(self) -> Mapping[str, Any]:
        """The job's own parameters, without what the platform keeps beside them."""
        found = self.params.get("validated_params")
        return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}

    @property
    def is_question(self) -> bool:
        """Whether a person waits for its answers."""
        return self.type == "inference" and self.priority >= QUESTION_PRIORITY


@dataclass(frozen=True, slots=True)
class JobRecord(JobSpec):
    """A job as stored.

    Attributes:
        status: See `JobStatus`.
        attempts: Runs started so far; the current run's attempt number.
        outputs: Last value of each key over the events of the last run, once that run has ended.
        worker_id: Worker that holds the job, while it is in progress.
        retries: Failures that were retried so far.
        failed_by: The job of `after` whose end has failed it; it is queued again with that one.
    """

    status: JobStatus = "pending"
    organization_id: str = ""
    attempts: int = 0
    outputs: Mapping[str, Any] | None = None
    worker_id: str | None = None
    failed_by: str | None = None
    retries: int = 0
    created_at: datetime = field(default=datetime.min)
    updated_at: datetime = field(default=datetime.min)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One attempt at a job.

    Attributes:
        attempt: 1 for the first run of a job, counting up.
        log_bytes: Length of the log stored so far.
        error: Why it failed, in one line.
        exit_code: Of the job's command; negative for a signal, None when it did not end by itself.
        cause: Of a failure, where it is known: `oom` or `hub`.
        is_given_back: Its worker has ended it in good order, which is no failure of the job and
            uses up none of `max_attempts`; its status is "failed".
    """

    id: int
    job_id: str
    worker_id: str | None
    attempt: int
    status: RunStatus
    created_at: datetime
    ended_at: datetime | None = None
    error: str | None = None
    exit_code: int | None = None
    log_bytes: int = 0
    cause: str | None = None
    is_given_back: bool = False

    @property
    def status_word(self) -> str:
        """Its status for people."""
        return "given back" if self.is_given_back else self.status


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event to be appended.

    Attributes:
        key: Unique within the run; appending a key again changes nothing, so batches can be sent
            twice.
        data: Free JSON; conventional keys are step, tag, type, loss, file, path, error.
    """

    key: str
    data: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class EventRecord(dict[str, Any]):
    """An event as stored; ids ascend in the order of appending.

    It is a dict of its fields, too: `event["data"]["loss"]` is `event.data["loss"]`.
    """

    id: int
    run_id: int
    data: Mapping[str, Any]
    created_at: datetime

    def __post_init__(self) -> None:
        self.update(vars(self))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A stored file. `filename` is a base name: the uploader's path is never kept."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker says of itself when it registers.

    Attributes:
        vram_gb: Memory of all its GPUs together, in GiB; 0 without a GPU.
        hardware_type: Such as "2x H100S"; "cpu" without a GPU.
        cloud_type: Tier of the pod that it runs in; None outside a cloud.
    """

    id: str
    docker_image: str = ""
    hardware_type: str = "cpu"
    gpu_count: int = 0
    vram_gb: int = 0
    cloud_type: CloudType | None = None
    pod_id: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerRecord(WorkerSpec):
    """A worker as stored; `pinged_at` is its last heartbeat."""

    status: WorkerStatus = "active"
    created_at: datetime = field(default=datetime.min)
    pinged_at: datetime = field(default=datetime.min)


@dataclass(frozen=True, slots=True)
class QueueState:
    """What holds for all jobs of an organization.

    Attributes:
        paused_at: No worker gets a new job since then; None when the queue goes on.
        max_duration_s: Of runs whose job says none; None for no limit.
    """

    paused_at: datetime | None = None
    max_duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Ahead:
    """Pending jobs that workers may take now, in the order in which they are taken.

    Attributes:
        total: How many there are.
        ending: How many of them end: all but deployed models, which have workers of their own.
        first: Id of the first of those.
        questions: How many are questions.
        first_question: Id of the first of those.
        question_gb: GPU memory that it asks for, in GiB.
    """

    total: int = 0
    ending: int = 0
    first: str | None = None
    questions: int = 0
    first_question: str | None = None
    question_gb: int = 0

    def then(self, job: JobRecord) -> Ahead:
        """With one more job behind them."""
        ends, asks = job.type != SERVED, job.is_question
        is_first_question = asks and self.first_question is None
        return Ahead(
            self.total + 1,
            self.ending + ends,
            job.id if ends and self.first is None else self.first,
            self.questions + asks,
            job.id if is_first_question else self.first_question,
            job.requires_vram_gb if is_first_question else self.question_gb,
        )


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """What there is before a pending job.

    Attributes:
        needed: Jobs of its `after` that have not ended: id and status.
        like_it: Other jobs that run with its label.
        ahead: What workers take before it; nothing while the queue is paused.
    """

    needed: tuple[tuple[str, JobStatus], ...] = ()
    like_it: int = 0
    ahead: Ahead = Ahead()


@dataclass(frozen=True, slots=True)
class Claim:
    """A job and the run that was created for it: what `claim_job` hands to a worker."""

    job: JobRecord
    run: RunRecord


@dataclass(frozen=True, slots=True)
class WorkerRow(WorkerRecord):
    """A worker with what the cluster manager keeps of its pod.

    Attributes:
        provider: Who runs its pod, such as "runpod"; None for a worker that nobody manages.
        price_usd_per_hour: Of the whole pod; None when it is not known.
        started_at: From when the pod is paid for.
        ended_at: The pod is known to be gone since then.
    """

    provider: str | None = None
    price_usd_per_hour: float | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A pending job with what decides when its worker may be started.

    Attributes:
        owner: The key that submitted it.
        usd_left: What it, and its key, may still spend; None without a cap.
    """

    job: JobRecord
    owner: str = ""
    usd_left: float | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key of an organization, without the key itself.

    Attributes:
        prefix: Its first characters, by which its owner knows it.
        role: `admin`, `member` or `worker`.
        worker_id: The only worker that it may be, for a key of that role.
        email: The member's that it belongs to.
        spent_usd: What its jobs have cost so far.
    """

    id: str
    name: str
    prefix: str
    role: str
    worker_id: str | None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    budget_usd: float | None = None
    email: str = ""
    spent_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that `key` is told."""

    id: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """A member of an organization; `role` is `admin` or `member`."""

    id: str
    email: str
    role: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A change that somebody asked for.

    Attributes:
        who: The e-mail address of the member; on this machine the name of the user.
        key_name: Of the key that was used; empty on this machine.
        action: Such as `job.submit`, `job.cancel`, `key.create`, `queue.pause`.
        target: The job, key, member or secret that was changed.
        details: What else is to be known; no secrets.
    """

    id: int
    created_at: datetime
    who: str
    key_name: str
    action: str
    target: str | None
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SecretRecord:
    """A secret of an organization, without its value."""

    name: str
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Garbage:
    """What nobody needed any more: files and logs, and their bytes."""

    files: int
    file_bytes: int
    logs: int
    log_bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a store takes up: contents of files, logs, and the database with all records."""

    file_bytes: int
    log_bytes: int
    database_bytes: int
