"""`ow ls`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from openweights.cli.output import (
    age,
    fit,
    json_option,
    natural_widths,
    note,
    one_line,
    plain,
    print_json,
    print_table,
    terminal_width,
)
from openweights.cli.store import is_remote, open_store, where
from openweights.client.job_kinds import kind_word
from openweights.client.secrets import without_keys
from openweights.client.serving.sampling import is_of_sample
from openweights.client.watching.metrics import LEADING, leading_words
from openweights.client.watching.progress import status_word
from openweights.client.watching.scores import best_scores, score_words
from openweights.client.watching.waiting import states_of, why_failed
from openweights.types import ENDED, JOB_STATUSES, JobRecord, JobStatus

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_SCORES = "scores"


@click.command()
@click.option(
    "--status",
    "statuses",
    type=click.Choice(JOB_STATUSES),
    multiple=True,
    help="Only jobs of this status; may be given several times.",
)
@click.option("--label", metavar="NAME", help="Only jobs with this label.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="At most so many jobs.",
)
@click.option("-a", "--all", "all_jobs", is_flag=True, help="Also those of `job.sample`.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ids only.")
@json_option
def ls(
    statuses: tuple[JobStatus, ...],
    label: str | None,
    limit: int,
    all_jobs: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """List jobs, the last changed first.

    Those that `job.sample` has made for itself are left out.
    """
    with open_store() as backend:
        jobs, hidden = listed(backend, statuses, limit, label=label, all_jobs=all_jobs)
        if quiet:
            for job in jobs:
                click.echo(job.id)
            return
        last = {job.id: last_values(backend, job) for job in jobs}
        now = states_of(backend, jobs, is_remote=is_remote())
    if as_json:
        print_json([plain(job) | {"last": last[job.id]} for job in jobs])
    elif jobs:
        columns = _columns(jobs, is_remote=is_remote())
        rows = [_row(job, last[job.id], now.get(job.id, ""), columns) for job in jobs]
        print_table(columns, short_models(columns, rows, terminal_width()))
    else:
        asked = [f" of status {', '.join(statuses)}"] if statuses else []
        asked += [f" with the label {label}"] if label else []
        note("no jobs" + ("".join(asked) or " yet") + f" in {where()}")
    if hidden and not as_json:
        note(f"{hidden} of job.sample, not ended, not shown; `ow ls --all` shows all")


def listed(
    backend: Backend,
    statuses: tuple[JobStatus, ...],
    limit: int,
    *,
    label: str | None = None,
    all_jobs: bool,
) -> tuple[list[JobRecord], int]:
    """The jobs that are shown, without keys, and how many open ones of `job.sample` are not."""
    asked = limit

    def is_asked(job: JobRecord) -> bool:
        return job.label == label if label is not None else all_jobs or not is_of_sample(job)

    while True:
        found = backend.list_jobs(statuses=statuses or None, limit=asked)
        shown = [job for job in found if is_asked(job)][:limit]
        if len(shown) == limit or len(found) < asked:
            is_whole = all_jobs or label is not None
            return [*map(without_keys, shown)], 0 if is_whole else _count(found)
        asked *= 4


def _count(jobs: Sequence[JobRecord]) -> int:
    """Those that still keep a worker, or wait for one: the others are of no interest here."""
    return sum(is_of_sample(job) and job.status not in ENDED for job in jobs)


def last_values(backend: Backend, job: JobRecord) -> dict[str, Any]:
    """Last `step` and leading measures of the job's last run, and why it failed if it did; of what
    evaluates its `scores` by task.
    """
    if job.status == "pending":
        return {}
    keys = ["step", *LEADING]
    outputs = job.outputs
    if outputs is None:
        outputs = backend.latest_values(keys, job_id=job.id)
    values = {key: outputs[key] for key in keys if key in outputs}
    if job.status == "failed":
        runs = [] if job.failed_by else backend.list_runs(job_id=job.id, limit=1)
        values["error"] = why_failed(job, runs[-1].error if runs else None)
    elif best := best_scores(backend, job):
        values[_SCORES] = best
    return values


def last_words(last: Mapping[str, Any], job: JobRecord) -> str:
    """What of `last_values` a table has room for; empty when there is none."""
    return leading_words(last) or score_words(last.get(_SCORES) or {}, job)


def _columns(jobs: Sequence[JobRecord], *, is_remote: bool) -> tuple[str, ...]:
    """What the table shows: on this machine no job has a tier, and few people use labels."""
    cloud = ("cloud",) if is_remote else ()
    label = ("label",) if any(job.label for job in jobs) else ()
    return ("id", "status", "kind", "model", "age", *cloud, *label, "last")


def short_models(
    columns: Sequence[str], rows: Sequence[Sequence[str]], room: int
) -> Sequence[Sequence[str]]:
    """The rows, without the models' organizations where their names would be cut."""
    place = columns.index("model")
    natural = natural_widths([columns, *rows], room)
    if fit(natural, room)[place] == natural[place]:
        return rows
    return [(*row[:place], row[place].rpartition("/")[2], *row[place + 1 :]) for row in rows]


def _row(
    job: JobRecord, last: Mapping[str, Any], state: str, columns: Sequence[str]
) -> tuple[str, ...]:
    cells = {
        "id": job.id,
        "status": status_word(job),
        "kind": kind_word(job),
        "model": model_name(job),
        "age": age(job.created_at),
        "cloud": str(job.params.get("cloud_type") or "-"),
        "label": job.label or "-",
        "last": one_line(last.get("error") or state or last_words(last, job) or "-"),
    }
    return tuple(cells[name] for name in columns)


def model_name(job: JobRecord) -> str:
    """Of a folder only its name: the path says nothing in a table."""
    model = _models_asked(job.model, job.validated_params)
    return model.rstrip("/").rpartition("/")[2] if model.startswith("/") else model


def _models_asked(model: str | None, params: Mapping[str, Any]) -> str:
    """The model; of a job that asks several the first, and how many more."""
    models: object = params.get("models" if model is None else "other_models") or []
    names = cast("list[object]", models) if isinstance(models, list) else [models]
    names = [model, *names] if model is not None else names or ["-"]
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
