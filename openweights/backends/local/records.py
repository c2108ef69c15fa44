"""Between rows of the SQLite store and the records of `openweights.types`.

Moments are stored as whole microseconds since 1970, nested values as JSON.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from openweights.backends.values import (
    FIRST_MOMENT,
    LAST_MOMENT,
    base_name,
    check_moment,
    check_params_size,
    check_spec,
    check_worker,
    moment_within,
    retry_from_json,
)
from openweights.json_values import dump, storable, to_json
from openweights.types import (
    AuditRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    JobSpec,
    QueueState,
    Retry,
    RunRecord,
    WorkerRecord,
    WorkerSpec,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LAST = 1 << 53  # after the year 2200
_FIRST_MICROS, _LAST_MICROS = (
    (moment - _EPOCH) // _MICROSECOND for moment in (FIRST_MOMENT, LAST_MOMENT)
)


def to_micros(moment: datetime) -> int:
    """Raises InvalidInputError for a moment without a time zone."""
    return (check_moment(moment) - _EPOCH) // _MICROSECOND


def from_micros(value: int) -> datetime:
    """Of what no clock of ours has written, the nearest moment that one could have."""
    if _FIRST_MICROS <= value <= _LAST_MICROS:
        return _EPOCH + timedelta(microseconds=value)
    return moment_within(_EPOCH + timedelta(microseconds=min(max(value, 0), _LAST)))


def moment_or_none(value: int | None) -> datetime | None:
    return None if value is None else from_micros(value)


def with_cloud_type(params: str, other: str) -> str:
    """JSON `params` with the cloud type of `other`."""
    own, new = json.loads(params), json.loads(other)
    if own.get("cloud_type") == new.get("cloud_type"):
        return params
    return dump({**own, "cloud_type": new.get("cloud_type")})


def job_columns(spec: JobSpec) -> dict[str, Any]:
    """What a submission writes into a row of `jobs`."""
    check_spec(spec)
    hardware = spec.allowed_hardware
    return {
        "id": spec.id,
        "type": spec.type,
        "script": storable(spec.script),
        "params": check_params_size(to_json(dict(spec.params), "params")),
        "model": spec.model,
        "docker_image": spec.docker_image,
        "requires_vram_gb": spec.requires_vram_gb,
        "allowed_hardware": None if hardware is None else json.dumps(list(hardware)),
        "bundle_file": spec.bundle_file,
        "priority": spec.priority,
        "max_attempts": spec.max_attempts,
        "timeout_at": None if spec.timeout_at is None else to_micros(spec.timeout_at),
        "after": json.dumps(spec.after) if spec.after else None,
        "not_before": None if spec.not_before is None else to_micros(spec.not_before),
        "label": spec.label,
        "max_running": spec.max_running,
        "max_duration_s": spec.max_duration_s,
        "stall_timeout_s": spec.stall_timeout_s,
        "retry": None if spec.retry is None else json.dumps(asdict(spec.retry)),
    }


def job_record(row: sqlite3.Row | Mapping[str, Any], organization_id: str) -> JobRecord:
    hardware = row["allowed_hardware"]
    outputs = row["outputs"]
    after = row["after"]
    return JobRecord(
        id=row["id"],
        type=row["type"],
        script=row["script"],
        params=json.loads(row["params"]),
        model=row["model"],
        docker_image=row["docker_image"],
        requires_vram_gb=row["requires_vram_gb"],
        allowed_hardware=None if hardware is None else tuple(json.loads(hardware)),
        bundle_file=row["bundle_file"],
        priority=row["priority"],
        max_attempts=row["max_attempts"],
        timeout_at=moment_or_none(row["timeout_at"]),
        after=() if after is None else tuple(json.loads(after)),
        not_before=moment_or_none(row["not_before"]),
        label=row["label"],
        max_running=row["max_running"],
        max_duration_s=row["max_duration_s"],
        stall_timeout_s=row["stall_timeout_s"],
        retry=retry_of(row),
        status=row["status"],
        organization_id=organization_id,
        attempts=row["attempts"],
        outputs=None if outputs is None else json.loads(outputs),
        worker_id=row["worker_id"],
        failed_by=row["failed_by"],
        retries=row["retries"],
        created_at=from_micros(row["created_at"]),
        updated_at=from_micros(row["updated_at"]),
    )


def retry_of(row: sqlite3.Row | Mapping[str, Any]) -> Retry | None:
    text = row["retry"]
    return None if text is None else retry_from_json(json.loads(text))


def queue_state(row: sqlite3.Row) -> QueueState:
    return QueueState(moment_or_none(row["paused_at"]), row["max_duration_s"])


def audit_record(row: sqlite3.Row) -> AuditRecord:
    return AuditRecord(
        id=row["id"],
        created_at=from_micros(row["created_at"]),
        who=row["who"],
        key_name="",
        action=row["action"],
        target=row["target"],
        details=json.loads(row["details"]),
    )


def run_record(row: sqlite3.Row | Mapping[str, Any], log_bytes: int) -> RunRecord:
    return RunRecord(
        id=row["id"],
        job_id=row["job_id"],
        worker_id=row["worker_id"],
        attempt=row["attempt"],
        status=row["status"],
        created_at=from_micros(row["created_at"]),
        ended_at=moment_or_none(row["ended_at"]),
        error=row["error"],
        exit_code=row["exit_code"],
        log_bytes=log_bytes,
        cause=row["cause"],
        is_given_back=bool(row["is_given_back"]),
    )


def event_record(row: sqlite3.Row) -> EventRecord:
    return EventRecord(
        id=row["id"],
        run_id=row["run_id"],
        data=json.loads(row["data"]),
        created_at=from_micros(row["created_at"]),
    )


def file_record(row: sqlite3.Row) -> FileRecord:
    return FileRecord(
        id=row["id"],
        purpose=row["purpose"],
        filename=base_name(row["filename"]),
        bytes=row["bytes"],
        created_at=from_micros(row["created_at"]),
    )


def worker_columns(spec: WorkerSpec) -> dict[str, Any]:
    """What a registration writes into a row of `workers`."""
    check_worker(spec)
    return {
        "id": spec.id,
        "docker_image": spec.docker_image,
        "hardware_type": spec.hardware_type,
        "gpu_count": spec.gpu_count,
        "vram_gb": spec.vram_gb,
        "cloud_type": spec.cloud_type,
        "pod_id": spec.pod_id,
        "cached_models": "[]",  # a column of the first version, which filled it with nothing else
    }


def worker_record(row: sqlite3.Row) -> WorkerRecord:
    return WorkerRecord(
        id=row["id"],
        docker_image=row["docker_image"],
        hardware_type=row["hardware_type"],
        gpu_count=row["gpu_count"],
        vram_gb=row["vram_gb"],
        cloud_type=row["cloud_type"],
        pod_id=row["pod_id"],
        status=row["status"],
        created_at=from_micros(row["created_at"]),
        pinged_at=from_micros(row["pinged_at"]),
    )
