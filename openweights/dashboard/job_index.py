"""The jobs of a store in memory, kept fresh by asking for what changed, and filtered."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from openweights.backends.base import Backend
from openweights.client.job_kinds import kind_word
from openweights.client.secrets import without_keys
from openweights.client.serving.sampling import is_of_sample
from openweights.client.watching.attempts import begins_again
from openweights.client.watching.metrics import leading_words
from openweights.client.watching.progress import read_progress, status_word
from openweights.client.watching.queue import QueueView
from openweights.client.watching.scores import best_scores, models_of, score_words
from openweights.client.watching.waiting import why_failed
from openweights.types import JobRecord

_FIRST_LOOK = 64
# Rows that were removed are noticed by reading all of them again, that seldom.
_RELOAD_S = 60.0
_FRESH_S = 0.5
_MOST_ERRORS = 1000

SortKey = Literal["updated", "created", "status", "model", "id", "kind"]
SORT_KEYS: tuple[SortKey, ...] = ("updated", "created", "status", "model", "id", "kind")


@dataclass(frozen=True, slots=True)
class JobQuery:
    """What the table is to show.

    Attributes:
        text: Words that the row must hold, each of them, anywhere in what is shown or in its
            parameters.
        samples: Whether the jobs that `job.sample` made for itself are shown.
        trained: Only jobs that train.
        status, kind, model, tag: Exact; empty for any. `tag` is a key of `meta`, or `key=value`.
        sort: One of `SORT_KEYS`; `descending` turns it around.
    """

    text: str = ""
    samples: bool = False
    trained: bool = False
    status: str = ""
    kind: str = ""
    model: str = ""
    tag: str = ""
    sort: SortKey = "updated"
    descending: bool = True
    offset: int = 0
    limit: int = 100


class JobIndex:
    """All jobs of a store, newest change first. Safe to use from several threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._errors: dict[str, str] = {}
        self._scores: dict[tuple[str, str], str] = {}
        self._read_at = float("-inf")
        self._reload_at = float("-inf")

    def page(self, query: JobQuery) -> dict[str, Any]:
        """Rows of the table with what stands around them:
        `{rows, total, statuses, kinds, models, samples, as_of}`.

        `statuses` counts what the other filters leave; `changed_since(as_of)` is what this page
        does not know yet.
        """
        rows = self._fresh()
        wanted = [row for row in rows if matches(row, query)]
        statuses = Counter(str(row["status"]) for row in wanted)
        if query.status:
            wanted = [row for row in wanted if row["status"] == query.status]
        wanted.sort(key=lambda row: _sort_value(row, query.sort), reverse=query.descending)
        stop = query.offset + query.limit
        return {
            "rows": self._shown(wanted[query.offset : stop]),
            "total": len(wanted),
            "statuses": dict(statuses),
            "kinds": sorted({str(row["kind"]) for row in rows}),
            "models": sorted({name for row in rows for name in cast("list[str]", row["models"])}),
            "samples": sum(bool(row["of_sample"]) for row in rows),
            "as_of": max((str(row["updated"]) for row in rows), default=""),
        }

    def changed_since(self, moment: str) -> list[dict[str, Any]]:
        """Rows whose record changed after `moment` (ISO 8601), oldest change first."""
        rows = [row for row in self._fresh() if str(row["updated"]) > moment]
        return self._shown(sorted(rows, key=lambda row: str(row["updated"])))

    def records(self) -> list[JobRecord]:
        """Every job, without keys."""
        return [cast("JobRecord", row["_job"]) for row in self._fresh()]

    def forget(self, job_id: str) -> None:
        """The job is no more."""
        with self._lock:
            self._rows.pop(job_id, None)

    def _shown(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows without what only the search needs, and with `last`, which says how each stands.
        Only rows that somebody looks at are asked for that.
        """
        jobs = [cast("JobRecord", row["_job"]) for row in rows]
        failed = {job.id for job in jobs if job.status == "failed"}
        if failed - self._errors.keys():
            # One question for all of them: a project is far away.
            newest = self._backend.list_runs(status="failed", limit=_MOST_ERRORS)
            self._errors = dict.fromkeys(failed, "") | {r.job_id: r.error or "" for r in newest}
        waits: dict[str, str] = {}
        if asked := [job.id for job in jobs if job.status == "pending"]:
            with self._lock:
                known = [cast("JobRecord", row["_job"]) for row in self._rows.values()]
            pending = [job for job in known if job.status == "pending"]
            is_remote = self._backend.team is not None
            queue = QueueView.read(self._backend, is_remote=is_remote, pending=pending)
            waits = queue.reasons(asked)
        return [
            {key: value for key, value in row.items() if not key.startswith("_")}
            | {"last": self._last(job, waits.get(job.id, ""))}
            for row, job in zip(rows, jobs, strict=True)
        ]

    def _last(self, job: JobRecord, waits: str) -> str:
        if job.status == "pending":
            return " · ".join(filter(None, (waits, begins_again(self._backend, job))))
        if job.status == "in_progress":
            return read_progress(self._backend, job).words()
        if job.status == "failed":
            return why_failed(job, self._errors.get(job.id)) or ""
        return leading_words(job.outputs or {}) or self._scored(job)

    def _scored(self, job: JobRecord) -> str:
        """`score_words`, asked for once: what has ended scores no more."""
        key = job.id, job.updated_at.isoformat()
        if key not in self._scores:
            self._scores[key] = score_words(best_scores(self._backend, job), job)
        return self._scores[key]

    def _fresh(self) -> list[dict[str, Any]]:
        with self._lock:
            now = time.monotonic()
            if now >= self._reload_at:
                self._rows = {job.id: _row(job) for job in self._backend.list_jobs(limit=None)}
                self._reload_at = now + _RELOAD_S
            elif now >= self._read_at + _FRESH_S:
                self._read_changes()
            else:
                return list(self._rows.values())
            self._read_at = now
            return list(self._rows.values())

    def _read_changes(self) -> None:
        """Ask for more and more of the newest, until one is there that we have as it is."""
        limit = _FIRST_LOOK
        while True:
            jobs = self._backend.list_jobs(limit=limit)
            known = any(self._has(job) for job in jobs)
            if known or len(jobs) < limit:
                break
            limit *= 4
        for job in jobs:
            if not self._has(job):
                self._rows[job.id] = _row(job)
                self._errors.pop(job.id, None)

    def _has(self, job: JobRecord) -> bool:
        row = self._rows.get(job.id)
        return row is not None and row["updated"] == job.updated_at.isoformat()


def matches(row: Mapping[str, Any], query: JobQuery) -> bool:
    """Whether the filters other than `status` let the row through."""
    if row["of_sample"] and not query.samples:
        return False
    if query.trained and not row["trains"]:
        return False
    if query.kind and row["kind"] != query.kind:
        return False
    if query.model and query.model not in cast("list[str]", row["models"]):
        return False
    if query.tag and not _has_tag(cast("Mapping[str, Any]", row["meta"]), query.tag):
        return False
    text = str(row["_text"])
    return all(word in text for word in query.text.lower().split())


def _has_tag(meta: Mapping[str, Any], tag: str) -> bool:
    key, given, value = tag.partition("=")
    return key in meta and (not given or str(meta[key]) == value)


def _row(job: JobRecord) -> dict[str, Any]:
    job = without_keys(job)
    params = job.validated_params
    meta, models = params.get("meta"), models_of(job)
    row: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "status_word": status_word(job),
        "kind": kind_word(job),
        "trains": job.type == "fine-tuning",
        "loss": params.get("loss") or "",
        "model": models[0] if len(models) == 1 else f"{len(models)} models" if models else "",
        "models": models,
        "learning_rate": params.get("learning_rate"),
        "meta": cast("dict[str, Any]", meta) if isinstance(meta, dict) else {},
        "cloud": job.params.get("cloud_type"),
        "attempts": job.attempts,
        "of_sample": is_of_sample(job),
        "worker": job.worker_id or "",
        "created": job.created_at.isoformat(),
        "updated": job.updated_at.isoformat(),
    }
    described = " ".join(str(value) for value in row.values())
    row["_job"] = job
    row["_text"] = f"{described} {job.script} {json.dumps(params, default=str)}".lower()
    return row


def _sort_value(row: Mapping[str, Any], key: SortKey) -> tuple[str, str]:
    return str(row[key]).lower(), str(row["id"])
