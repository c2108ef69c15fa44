"""The verbs of `Backend` as calls of SQL functions and selections of rows."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, BinaryIO, Literal

from openweights.backends.supabase.connection import Project, Query
from openweights.backends.supabase.records import (
    Row,
    claim_of,
    columns,
    event_json,
    from_row,
    from_rows,
    moment_text,
    plain,
    spec_json,
    worker_json,
)
from openweights.backends.supabase.storage import (
    CONTENT_TYPE,
    DIGITS,
    PART_BYTES,
    Content,
    Digest,
    measured,
    open_download,
    upload_in_parts,
)
from openweights.backends.values import base_name, check_purpose, checked_span
from openweights.errors import (
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    shown,
)
from openweights.json_values import contains, storable
from openweights.types import (
    Ahead,
    AuditRecord,
    Claim,
    EventDraft,
    EventRecord,
    FileRecord,
    Instruction,
    JobRecord,
    JobSpec,
    JobStatus,
    QueuePlace,
    QueueState,
    RunRecord,
    RunStatus,
    WorkerRecord,
    WorkerSpec,
    WorkerStatus,
)

_UPLOADS = 3
_RUN = "*"  # whatever there is of it: a project may be of a version before


class FileVerbs(Project):
    """The part of `Backend` about files."""

    def put_file(self, content: BinaryIO, purpose: str, filename: str) -> FileRecord:
        check_purpose(purpose)
        with measured(content, self.organization_id) as found:
            file_id = f"{purpose}:file-{found.digest[:DIGITS]}"
            values = {
                "id": file_id,
                "purpose": purpose,
                "filename": base_name(filename),
                "bytes": found.bytes,
                "sha256": found.digest,
            }
            # What lies there without a record is not trusted, but written again.
            known = self.rpc("find_file", id=file_id)
            has_record = known is not None and known["is_settled"]
            for _ in range(_UPLOADS):
                refusal = None if has_record else self._upload(file_id, found)
                record = self._put_record(values)
                if record is not None:
                    return record
                if isinstance(refusal, ConfigurationError):
                    raise refusal
                has_record = False
        raise PlatformError(f"the project did not keep {file_id}: upload it again")

    def _put_record(self, values: Mapping[str, Any]) -> FileRecord | None:
        """The record, made if need be; None when the project has no such content."""
        try:
            return from_row(FileRecord, self.rpc("put_file_record", **values))
        except NotFoundError:
            return None

    def _upload(self, file_id: str, found: Content) -> OpenWeightsError | None:
        """Store content; answers why not, which need not matter.

        It is refused when there is a record, such as that of somebody who was quicker, or one that
        this key may not see; and the service may forget what has arrived.
        """
        key, http = self._place_of_own(file_id), self._open().http
        try:
            if found.bytes > PART_BYTES:
                upload_in_parts(http, self._storage_url, key, found, self._patiently)
            else:
                data = b"".join(found.part(0))
                options = {"content-type": CONTENT_TYPE, "upsert": "true"}
                self._patiently(lambda: self._bucket().upload(key, data, options))
        except (ConfigurationError, NotFoundError) as error:
            return error
        return None

    def get_file(self, file_id: str) -> FileRecord:
        rows = self._rows("files", columns(FileRecord), lambda query: query.eq("id", file_id))
        return from_row(FileRecord, _one(rows, f"file {file_id!r}"))

    def open_file(self, file_id: str) -> BinaryIO:
        known = self.rpc("find_file", id=file_id)
        if known is None:
            raise NotFoundError(f"no file {shown(file_id)} in the organization")
        key = self._place(known["object"])
        check = Digest(self.organization_id, file_id, known["sha256"])
        try:
            return open_download(self._open().http, self._storage_url, key, check, self._patiently)
        except NotFoundError:
            raise NotFoundError(
                f"the content of {file_id} is gone from the project's storage: upload it again"
            ) from None

    def list_files(
        self, *, purpose: str | None = None, limit: int | None = 100
    ) -> list[FileRecord]:
        def narrow(query: Query) -> Query:
            return query if purpose is None else query.eq("purpose", purpose)

        return self._newest("files", FileRecord, "created_at", limit, narrow)

    def delete_file(self, file_id: str) -> None:
        deleted = self.rpc("delete_file_record", id=file_id)
        # After the record, so that nothing in between leaves a record of nothing. Of a file without
        # a record what this key has begun to put.
        place = self._place(deleted) if deleted else self._place_of_own(file_id)
        self._remove([place])

    def _remove(self, places: list[str]) -> None:
        self._patiently(lambda: self._bucket().remove(places))

    def _place(self, below: str) -> str:
        return f"{self.organization_id}/{below}"

    def _place_of_own(self, file_id: str) -> str:
        """Where this key puts content: nobody else writes there."""
        return self._place(f"{self.identity['key_id']}/{file_id}")

    @property
    def _storage_url(self) -> str:
        return f"{self.url}/storage/v1"


class JobVerbs(Project):
    """The part of `Backend` about jobs."""

    def submit_job(self, spec: JobSpec) -> JobRecord:
        return from_row(JobRecord, self.rpc("submit_job", spec=spec_json(spec)))

    def get_job(self, job_id: str) -> JobRecord:
        rows = self._rows("jobs", columns(JobRecord), lambda query: query.eq("id", job_id))
        return from_row(JobRecord, _one(rows, f"job {job_id!r}"))

    def list_jobs(
        self,
        *,
        statuses: Sequence[JobStatus] | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int | None = 100,
    ) -> list[JobRecord]:
        if statuses is not None and not statuses:
            return []
        part = None if where is None else plain(dict(where), "where")

        def narrow(query: Query) -> Query:
            if statuses is not None:
                query = query.in_("status", list(statuses))
            # It also finds lists that merely contain what is asked for; those are left out below.
            return query if part is None else query.contains("params", part)

        def keep(job: JobRecord) -> bool:
            return contains(job.params, part)

        return self._newest(
            "jobs", JobRecord, "updated_at", limit, narrow, None if part is None else keep
        )

    def cancel_job(self, job_id: str) -> JobRecord:
        return from_row(JobRecord, self.rpc("cancel_job", job_id=job_id))

    def restart_job(self, job_id: str) -> JobRecord:
        def look() -> Row | None:
            rows = self._rows("jobs", columns(JobRecord), lambda query: query.eq("id", job_id))
            return rows[0] if rows and rows[0]["status"] in ("pending", "in_progress") else None

        return from_row(JobRecord, self._rpc_once("restart_job", {"job_id": job_id}, look))

    def set_timeout(self, job_id: str, timeout_at: datetime | None) -> JobRecord:
        moment = None if timeout_at is None else moment_text(timeout_at)
        return from_row(JobRecord, self.rpc("set_timeout", job_id=job_id, timeout_at=moment))

    def place_in_queue(self, job: JobRecord | None = None) -> QueuePlace:
        asked = None
        if job is not None:
            asked = {"id": job.id, "priority": job.priority, "label": job.label}
            asked |= {"created_at": moment_text(job.created_at), "after": list(job.after)}
        found = self.rpc("place_in_queue", job=asked)
        needed = tuple((id, status) for id, status in found["needed"])
        return QueuePlace(needed, found["like_it"], from_row(Ahead, found["ahead"]))

    def queue_state(self) -> QueueState:
        return from_row(QueueState, self.rpc("queue_state"))

    def set_paused(self, is_paused: bool) -> QueueState:
        return from_row(QueueState, self.rpc("set_paused", is_paused=is_paused))

    def set_max_duration(self, seconds: float | None) -> QueueState:
        return from_row(QueueState, self.rpc("set_max_duration", seconds=seconds))

    def list_audit(self, *, target: str | None = None, limit: int = 100) -> list[AuditRecord]:
        def newest(query: Query) -> Query:
            query = query if target is None else query.eq("target", target)
            return query.order("id", desc=True).limit(limit)

        return from_rows(AuditRecord, self._rows("audit", columns(AuditRecord), newest))

    def _check_job(self, job_id: str) -> None:
        _one(self._rows("jobs", "id", lambda query: query.eq("id", job_id)), f"job {job_id!r}")


class RunVerbs(JobVerbs):
    """The part of `Backend` about runs, events and logs."""

    def get_run(self, run_id: int) -> RunRecord:
        rows = self._rows("runs", _RUN, lambda query: query.eq("id", run_id))
        return from_row(RunRecord, _one(rows, f"run {run_id}"))

    def list_runs(
        self,
        *,
        job_id: str | None = None,
        worker_id: str | None = None,
        status: RunStatus | None = None,
        limit: int | None = None,
    ) -> list[RunRecord]:
        asked = {"job_id": job_id, "worker_id": worker_id, "status": status}
        given = {name: value for name, value in asked.items() if value is not None}

        def narrow(query: Query) -> Query:
            return query.match(given) if given else query

        found: list[RunRecord] = []
        for page in self._pages("runs", _RUN, narrow, after=None, descending=True):
            found.extend(from_rows(RunRecord, page))
            if limit is not None and len(found) >= limit:
                break
        if not found:
            self._check_asked(job_id, worker_id)
        return found[:limit][::-1]

    def _check_asked(self, job_id: str | None, worker_id: str | None) -> None:
        if job_id is not None:
            self._check_job(job_id)
        if worker_id is not None:
            rows = self._rows("workers", "id", lambda query: query.eq("id", worker_id))
            _one(rows, f"worker {worker_id!r}")

    def start_script_run(self, spec: JobSpec) -> Claim:
        def look() -> Mapping[str, Row] | None:
            rows = self._rows("runs", _RUN, lambda query: query.eq("job_id", spec.id))
            jobs = self._rows("jobs", columns(JobRecord), lambda query: query.eq("id", spec.id))
            return {"job": jobs[0], "run": rows[0]} if jobs and rows else None

        return claim_of(self._rpc_once("start_script_run", {"spec": spec_json(spec)}, look))

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
        text = None if error is None else storable(error)
        end = {"status": status, "error": text, "exit_code": exit_code, "cause": cause}
        return from_row(JobRecord, self.rpc("finish_run", run_id=run_id, attempt=attempt, **end))

    def release_run(
        self, run_id: int, attempt: int, *, reason: str, is_lost: bool = False
    ) -> JobRecord:
        end = {"attempt": attempt, "reason": storable(reason), "is_lost": is_lost}
        return from_row(JobRecord, self.rpc("release_run", run_id=run_id, **end))

    def touch_run(self, run_id: int) -> None:
        self.rpc("touch_run", run_id=run_id)

    def append_events(self, run_id: int, events: Sequence[EventDraft]) -> None:
        self.rpc("append_events", run_id=run_id, events=[event_json(event) for event in events])

    def list_events(
        self,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
        after: int = 0,
        type: str | None = None,
    ) -> Iterator[EventRecord]:
        name, value = _of(job_id, run_id)

        def narrow(query: Query) -> Query:
            query = query.eq(name, value)
            return query if type is None else query.eq("data->>type", type)

        pages = self._pages("events", columns(EventRecord), narrow, after=after)
        # The first page now, not when the caller gets to it: an unknown id is an error at once.
        first = next(pages, None)
        if first is None:
            self._check_job(value) if isinstance(value, str) else self.get_run(value)
            return iter(())
        return (event for page in chain([first], pages) for event in from_rows(EventRecord, page))

    def latest_values(
        self,
        keys: Sequence[str] | None = None,
        *,
        job_id: str | None = None,
        run_id: int | None = None,
    ) -> dict[str, Any]:
        _of(job_id, run_id)
        names = None if keys is None else list(keys)
        return self.rpc("latest_values", keys=names, job_id=job_id, run_id=run_id)

    def append_log(self, run_id: int, offset: int, data: bytes) -> None:
        text = base64.b64encode(data).decode()
        self.rpc("append_log", run_id=run_id, offset=offset, data=text)

    def read_log(self, run_id: int, offset: int = 0, limit: int = 1 << 20) -> bytes:
        offset, limit = checked_span(offset, limit)
        return base64.b64decode(self.rpc("read_log", run_id=run_id, offset=offset, limit=limit))


class WorkerVerbs(Project):
    """The part of `Backend` about workers."""

    def register_worker(self, worker: WorkerSpec) -> WorkerRecord:
        return from_row(WorkerRecord, self.rpc("register_worker", worker=worker_json(worker)))

    def list_workers(self, *, statuses: Sequence[WorkerStatus] | None = None) -> list[WorkerRecord]:
        if statuses is not None and not statuses:
            return []

        def narrow(query: Query) -> Query:
            return query if statuses is None else query.in_("status", list(statuses))

        return self._newest("workers", WorkerRecord, "created_at", None, narrow)

    def set_worker_status(self, worker_id: str, status: WorkerStatus) -> WorkerRecord:
        row = self.rpc("set_worker_status", worker_id=worker_id, status=status)
        return from_row(WorkerRecord, row)

    def claim_job(self, worker_id: str) -> Claim | None:
        answer = self.rpc("claim_job", worker_id=worker_id)
        if answer is None:
            return None
        try:
            return claim_of(answer)
        except (ValueError, TypeError, LookupError) as error:
            # It would be given out again for ever, and keep this worker from all others.
            run, reason = answer["run"], f"its record cannot be read: {error}"
            end = {"attempt": run["attempt"], "status": "failed", "error": reason}
            self.rpc("finish_run", run_id=run["id"], **end)
            return None

    def heartbeat(self, worker_id: str, run_id: int | None = None) -> Instruction:
        return self.rpc("heartbeat", worker_id=worker_id, run_id=run_id)


def _one(rows: list[Row], what: str) -> Row:
    if not rows:
        raise NotFoundError(f"no {what} in the organization")
    return rows[0]


def _of(job_id: str | None, run_id: int | None) -> tuple[str, str | int]:
    """The column and value that say whose events are meant."""
    if run_id is not None and job_id is None:
        return "run_id", run_id
    if job_id is not None and run_id is None:
        return "job_id", job_id
    raise InvalidInputError("give either job_id or run_id")
