"""All about one job: its parameters beside their defaults, its runs and files, and the lines that
would make it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from openweights.backends.base import Backend
from openweights.client import OpenWeights
from openweights.client.job_kinds import Jobs, kind_names, kind_word
from openweights.client.params import field_defaults
from openweights.client.secrets import without_keys
from openweights.client.watching.comparison import asked_for, headings
from openweights.client.watching.differences import parameters, telling_apart
from openweights.client.watching.field_order import in_order
from openweights.client.watching.file_names import file_names, with_names
from openweights.client.watching.meaning import names_apart
from openweights.client.watching.progress import read_progress, status_word
from openweights.client.watching.scores import models_of
from openweights.client.watching.unmeasured import Unmeasured, asked_for_elsewhere, unmeasured
from openweights.client.watching.waiting import state_of, why_failed
from openweights.dashboard.series import READ_S, SeriesCache
from openweights.errors import NotFoundError, OpenWeightsError
from openweights.models.names import name_as_given
from openweights.number_words import number_words
from openweights.types import JobRecord, RunRecord

if TYPE_CHECKING:
    from openweights.cluster.store import ClusterStore

_NAME = "finetuned_model_id"
_SHOWN_BYTES = 500
_CONTROLS = ("allowed_hardware", "priority", "max_attempts", "max_cost_usd", "after")


def job_details(ow: OpenWeights, job: JobRecord) -> dict[str, Any]:
    """What the page of a job shows beside its charts, log and samples."""
    job = without_keys(job)
    runs = ow.backend.list_runs(job_id=job.id)
    kind = kind_of(ow, job)
    python = python_lines(ow, job, kind)
    prices = worker_prices(ow.backend, runs)
    params = described_params(ow, job, kind)
    names = file_names(ow.backend, params)
    return {
        "id": job.id,
        "status": job.status,
        "status_word": status_word(job),
        "error": why_failed(job, runs[-1].error if runs else None),
        "progress": _progress(ow, job),
        "kind": kind_word(job),
        "made_by": kind,
        "model": job.model,
        "models": models_of(job),
        "created": job.created_at.isoformat(),
        "updated": job.updated_at.isoformat(),
        "timeout_at": _iso(job.timeout_at),
        "script": job.script,
        "cloud": job.params.get("cloud_type") if ow.settings.is_remote else None,
        "vram_gb": job.requires_vram_gb if ow.settings.is_remote else None,
        "hardware": list(job.allowed_hardware or ()),
        "image": job.docker_image,
        "worker": job.worker_id,
        "usd": _usd(runs, prices, ow.backend.now()),
        "attempts": job.attempts,
        "after": list(job.after),
        "mounted": job.params.get("mounted_files") or {},
        "params": [row | {"shown": with_names(row["value"], names)} for row in params],
        "runs": [_run(run) for run in runs],
        "python": python,
        "command": command_line(python),
    }


def _progress(ow: OpenWeights, job: JobRecord) -> dict[str, Any]:
    """`{words, step, total}`: how far its last run has come, or what a pending job waits for."""
    found = read_progress(ow.backend, job)
    words = state_of(ow.backend, job, found, is_remote=ow.settings.is_remote)
    return {"words": words, "step": found.step, "total": found.total}


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
    values = dict(job.validated_params)
    defaults = field_defaults(kind_named(ow, kind).params) if kind else {}
    name, usual = values.get(_NAME), defaults.get(_NAME)
    if isinstance(name, str) and isinstance(usual, str):
        # As it was said: who changes the copy wants no other job's name for it.
        model = str(values.get("model"))
        values[_NAME] = name_as_given(name, usual, model=model, job_id=job.id, org=ow.hf_org)
    rows = [
        {
            "name": name,
            "value": values[name],
            "default": defaults.get(name),
            "differs": name not in defaults or defaults[name] != values[name],
        }
        for name in in_order(values, defaults)
    ]
    return sorted(rows, key=lambda row: not row["differs"])


def python_lines(ow: OpenWeights, job: JobRecord, kind: str | None) -> str:
    """A script that submits the same job, and prints its id."""
    if kind is None:
        return f"# {job.id} is of a kind of your own: run the script that registers it\n"
    arguments = {
        row["name"]: row["value"] for row in described_params(ow, job, kind) if row["differs"]
    }
    arguments |= _changed_controls(job, kind_named(ow, kind))
    given = [_argument(ow.backend, name, value) for name, value in arguments.items()]
    create = [f"job = ow.{kind}.create(", *given, ")"]
    lines = ["from openweights import OpenWeights", "", "ow = OpenWeights()"]
    lines += _in_its_folder(job, create) if kind == "exec" else create
    return "\n".join([*lines, "print(job.id)", ""])


def _argument(backend: Backend, name: str, value: object) -> str:
    """A line of the call, with the names of the files behind it."""
    files = ", ".join(file_names(backend, value).values())
    literal = number_words(value) if isinstance(value, float) else repr(value)
    return f"    {name}={literal}," + (f"  # {files}" if files else "")


def _in_its_folder(job: JobRecord, create: Sequence[str]) -> list[str]:
    """With the files of a command's folder, which are part of what it does."""
    files = cast("Mapping[str, str]", job.params.get("mounted_files") or {})
    fetched = [f"ow.files.download({file!r}, folder / {path!r})" for path, file in files.items()]
    return [
        "from pathlib import Path",
        "from tempfile import TemporaryDirectory",
        "",
        "with TemporaryDirectory() as name:",
        "    folder = ow.exec.folder = Path(name)",
        *(f"    {line}" for line in (*fetched, *create)),
    ]


def command_line(python: str) -> str:
    """The command that does the same from a shell."""
    end = "EOF"
    while end in python:
        end += "F"
    return f"python - <<'{end}'\n{python}{end}\n"


def _changed_controls(job: JobRecord, kind: Jobs) -> dict[str, Any]:
    """How it is to run, as far as that was said: the client chooses the rest again."""
    record = asdict(job)
    usual = JobRecord(id="", type="custom", script="", params={})
    changed = {name: record[name] for name in _CONTROLS if record[name] != getattr(usual, name)}
    for name in ("allowed_hardware", "after"):
        if name in changed:
            changed[name] = list(changed[name])
    # For the models that it is asked of a job waits by itself.
    if before := [one for one in changed.pop("after", ()) if one not in models_of(job)]:
        changed["after"] = before
    if job.requires_vram_gb != _usual_vram_gb(job, kind):
        changed["requires_vram_gb"] = job.requires_vram_gb
    if secrets := job.params.get("secrets"):
        changed["secrets"] = secrets
    cloud = job.params.get("cloud_type")
    return changed | ({"cloud_type": cloud} if cloud not in (None, "SECURE") else {})


def _usual_vram_gb(job: JobRecord, kind: Jobs) -> int | None:
    try:
        return kind.vram_gb(kind.params.model_validate(job.validated_params)) or 0
    except (ValidationError, OpenWeightsError):
        return None


def _usd(runs: Sequence[RunRecord], prices: Mapping[str, float], now: datetime) -> float | None:
    """What its runs have cost so far, as far as the prices of their workers are known."""
    known = [(run, prices[id]) for run in runs if (id := run.worker_id or "") in prices]
    hours = [((run.ended_at or now) - run.created_at) / timedelta(hours=1) for run, _ in known]
    return sum(h * usd for h, (_, usd) in zip(hours, known, strict=True)) if known else None


def _run(run: RunRecord) -> dict[str, Any]:
    return {
        "id": run.id,
        "attempt": run.attempt,
        "status": run.status,
        "is_given_back": run.is_given_back,
        "started": run.created_at.isoformat(),
        "ended": _iso(run.ended_at),
        "worker": run.worker_id,
        "error": run.error,
        "log_bytes": run.log_bytes,
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def compared_jobs(ow: OpenWeights, job_ids: Sequence[str], series: SeriesCache) -> dict[str, Any]:
    """`{jobs: [{id, status, model, params, apart, usd_per_hour, error}], missing, differing,
    telling, headings, unmeasured, asked_elsewhere}`.

    `params` go by dotted names; `differing` are those that are not the same in all jobs, without
    those that some jobs do not have and the others leave at their default; `telling` are the fewest
    of these that tell the jobs apart; `headings` are what their columns are called beside those of
    measures, and `apart` what `names_apart` calls a job's measures. `unmeasured` are
    `{measure, words}`, as `Unmeasured` has them, and `asked_elsewhere` those that
    `asked_for_elsewhere` chooses; none while a history is still read. Ids of `missing` are of no
    job, as of one that was deleted since the comparison's address was kept.
    """
    jobs: list[JobRecord] = []
    missing: list[str] = []
    for job_id in job_ids:
        try:
            jobs.append(without_keys(ow.backend.get_job(job_id)))
        except NotFoundError:
            missing.append(job_id)
    files = file_names(ow.backend, [parameters(job) for job in jobs])
    given = [with_names(parameters(job), files) for job in jobs]
    names = with_names(asked_for(jobs), files)
    shown = [
        {
            "id": job.id,
            "status": job.status,
            "model": job.model,
            "params": params,
            "apart": apart,
            **_of_last_run(ow.backend, job),
        }
        for job, params, apart in zip(jobs, given, names_apart(given), strict=True)
    ]
    lacking = _unmeasured(jobs, series)
    return {
        "jobs": shown,
        "missing": missing,
        "differing": names,
        "telling": telling_apart(given, names),
        "headings": headings(names),
        "unmeasured": _told(lacking),
        "asked_elsewhere": _told(asked_for_elsewhere(lacking)),
    }


def _unmeasured(jobs: Sequence[JobRecord], series: SeriesCache) -> list[Unmeasured]:
    until = time.monotonic() + READ_S
    read = [series.of(job.id, until - time.monotonic()) for job in jobs]
    is_whole = all(one.complete for one in read)
    return unmeasured(jobs, [one.names() for one in read]) if is_whole else []


def _told(lacking: Sequence[Unmeasured]) -> list[dict[str, str]]:
    return [{"measure": one.measure, "words": one.words()} for one in lacking]


def _of_last_run(backend: Backend, job: JobRecord) -> dict[str, Any]:
    """What it costs by the hour, where that is known, and why it failed."""
    runs = backend.list_runs(job_id=job.id, limit=1)
    prices = worker_prices(backend, runs)
    return {
        "usd_per_hour": next(iter(prices.values()), None),
        "error": why_failed(job, runs[-1].error if runs else None),
    }


def worker_prices(backend: Backend, runs: Sequence[RunRecord]) -> dict[str, float]:
    """USD an hour of the workers of these runs, as far as they are known."""
    workers = sorted({run.worker_id for run in runs if run.worker_id is not None})
    if backend.team is None or not workers:
        return {}
    rows = cast("ClusterStore", backend.team).worker_rows(workers)
    return {row.id: row.price_usd_per_hour for row in rows if row.price_usd_per_hour is not None}


# ---- the log -------------------------------------------------------------------------------------


def log_matches(
    backend: Backend, run_id: int, text: str, after: int = 0, most: int = 200
) -> dict[str, Any]:
    """Lines of a run's log that hold `text`, whatever its case: `{lines: [{offset, line}], more}`.

    Args:
        after: Only lines that begin behind this byte; 0 for all.
        most: So many lines; `more` says whether there are others.
    """
    found = list(islice(_matches(backend, run_id, text.encode().lower(), after), most + 1))
    return {"lines": found[:most], "more": len(found) > most}


def _matches(backend: Backend, run_id: int, wanted: bytes, after: int) -> Iterator[dict[str, Any]]:
    offset, rest = after, b""
    while chunk := backend.read_log(run_id, offset + len(rest)):
        block = rest + chunk
        if offset == after > 0:  # in the middle of a line
            skipped = block.find(b"\n") + 1
            block, offset = block[skipped:], offset + skipped
        end = block.rfind(b"\n") + 1
        yield from _lines_with(block[:end], wanted, offset)
        rest, offset = block[end:], offset + end
    yield from _lines_with(rest, wanted, offset)


def _lines_with(block: bytes, wanted: bytes, offset: int) -> Iterator[dict[str, Any]]:
    low = block.lower()
    at = low.find(wanted)
    while at >= 0:
        start = block.rfind(b"\n", 0, at) + 1
        stop = block.find(b"\n", at)
        stop = len(block) if stop < 0 else stop
        shown = block[max(start, at - _SHOWN_BYTES // 2) : stop][:_SHOWN_BYTES]
        yield {"offset": offset + start, "line": shown.decode(errors="replace")}
        at = low.find(wanted, stop)
