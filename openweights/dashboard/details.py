"""All about one job: its parameters beside their defaults, its runs and files, and the lines that
would make it again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from functools import cache
from typing import Any, cast

from pydantic import BaseModel

from openweights.backends.base import Backend
from openweights.client import OpenWeights
from openweights.client.job_kinds import Jobs, field_defaults, kind_names
from openweights.client.secrets import without_keys
from openweights.types import JobRecord, RunRecord

_CONTROLS = ("allowed_hardware", "docker_image", "priority", "max_attempts", "max_cost_usd")


def job_details(ow: OpenWeights, job: JobRecord) -> dict[str, Any]:
    """What the page of a job shows beside its charts, log and samples."""
    job = without_keys(job)
    runs = ow.backend.list_runs(job_id=job.id)
    kind = kind_of(ow, job)
    return {
        "id": job.id,
        "status": job.status,
        "kind": kind or job.type,
        "model": job.model,
        "created": job.created_at.isoformat(),
        "updated": job.updated_at.isoformat(),
        "timeout_at": _iso(job.timeout_at),
        "script": job.script,
        "cloud": job.params.get("cloud_type"),
        "vram_gb": job.requires_vram_gb,
        "hardware": list(job.allowed_hardware or ()),
        "image": job.docker_image,
        "worker": job.worker_id,
        "attempts": job.attempts,
        "mounted": job.params.get("mounted_files") or {},
        "params": described_params(ow, job, kind),
        "runs": [_run(run) for run in runs],
        "python": python_lines(ow, job, kind),
        "command": command_line(job, kind),
    }


def kind_of(ow: OpenWeights, job: JobRecord) -> str | None:
    """Under which name of `ow.<name>.create` the job was made, as its id tells; None for a kind
    that is not known here.
    """
    prefix = job.id.partition("-")[0]
    kinds = {name: kind_named(ow, name) for name in kind_names()}
    return next((name for name, kind in kinds.items() if kind.id_prefix == prefix), None)


def kind_named(ow: OpenWeights, name: str) -> Jobs:
    """`ow.<name>`, one of `kind_names`."""
    return cast("Jobs", getattr(ow, name))


def described_params(ow: OpenWeights, job: JobRecord, kind: str | None) -> list[dict[str, Any]]:
    """`{name, value, default, differs}` of each parameter; those that differ first."""
    values = cast("Mapping[str, Any]", job.params.get("validated_params") or {})
    defaults = default_params(kind_named(ow, kind).params) if kind else {}
    rows = [
        {
            "name": name,
            "value": value,
            "default": defaults.get(name),
            "differs": name not in defaults or defaults[name] != value,
        }
        for name, value in values.items()
    ]
    return sorted(rows, key=lambda row: not row["differs"])


@cache
def default_params(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model's fields, as JSON; fields that must be given have none."""
    return {name: _as_json(value) for name, value in field_defaults(model).items()}


def python_lines(ow: OpenWeights, job: JobRecord, kind: str | None) -> str:
    """A script that submits the same job."""
    if kind is None:
        return f"# {job.id} is of a kind of your own: run the script that registers it\n"
    arguments = {
        row["name"]: row["value"] for row in described_params(ow, job, kind) if row["differs"]
    }
    arguments |= _changed_controls(job)
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    body = "\n".join(lines)
    head = "from openweights import OpenWeights\n\now = OpenWeights()\n"
    return f"{head}job = ow.{kind}.create(\n{body}\n)\n"


def command_line(job: JobRecord, kind: str | None) -> str:
    """The command that does the same from a shell."""
    if kind == "exec":
        cloud = shlex.quote(str(job.params.get("cloud_type")))
        return f"ow exec --cloud-type {cloud} -- {job.script}"
    return f"ow restart {job.id}" if job.status in ("failed", "canceled") else f"ow show {job.id}"


def _changed_controls(job: JobRecord) -> dict[str, Any]:
    record = asdict(job)
    usual = JobRecord(id="", type="custom", script="", params={})
    changed = {
        name: record[name] for name in _CONTROLS if record[name] not in (getattr(usual, name), None)
    }
    if "allowed_hardware" in changed:
        changed["allowed_hardware"] = list(changed["allowed_hardware"])
    changed.pop("docker_image", None)  # the client chooses the one of its version
    cloud = job.params.get("cloud_type")
    return changed | ({"cloud_type": cloud} if cloud not in (None, "SECURE") else {})


def _run(run: RunRecord) -> dict[str, Any]:
    return {
        "id": run.id,
        "attempt": run.attempt,
        "status": run.status,
        "started": run.created_at.isoformat(),
        "ended": _iso(run.ended_at),
        "worker": run.worker_id,
        "error": run.error,
        "log_bytes": run.log_bytes,
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _as_json(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return json.loads(json.dumps(value, default=str))


def log_matches(
    backend: Backend, run_id: int, text: str, most: int = 200
) -> Iterator[dict[str, Any]]:
    """Lines of a run's log that hold `text`: `{offset, line}`, the first `most` of them."""
    wanted, offset, rest, found = text.encode(), 0, b"", 0
    while chunk := backend.read_log(run_id, offset + len(rest)):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if wanted in line:
                yield {"offset": offset, "line": line[:500].decode(errors="replace")}
                found += 1
                if found >= most:
                    return
            offset += len(line) + 1
    if wanted in rest:
        yield {"offset": offset, "line": rest[:500].decode(errors="replace")}
