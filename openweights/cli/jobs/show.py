"""`ow show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from openweights.cli.output import (
    age,
    json_option,
    local_time,
    one_line,
    plain,
    print_fields,
    print_json,
    print_table,
)
from openweights.cli.store import JOB_ID, is_remote, open_store
from openweights.client.event_json import as_number
from openweights.client.job_kinds import default_params, kind_word
from openweights.client.jobs import find_job
from openweights.client.results import result_files
from openweights.client.secrets import without_keys
from openweights.client.watching.estimates import Estimate
from openweights.client.watching.field_order import in_order
from openweights.client.watching.file_names import file_names, with_names
from openweights.client.watching.panels import rank_of
from openweights.client.watching.progress import status_word
from openweights.client.watching.waiting import state_of, why_failed
from openweights.number_words import number_words, value_words
from openweights.types import ENDED, JobRecord, RunRecord

# So many lines of a section fit a screen of 40 beside the others.
_SHOWN = 4
_PARAMETERS_SHOWN = 9
# Be they at their defaults: what decides how a training goes.
_ALWAYS_SHOWN = frozenset(
    {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"}
)
_MOUNTED_SHOWN = 2
_WIDEST = 100
# Said elsewhere, or of no interest without their event.
_NO_FIGURES = frozenset({"step", "max_steps", "from_step", "rows", "row", "message", "block"})


@click.command()
@click.argument("job", type=JOB_ID)
@json_option
def show(job: str, as_json: bool) -> None:
    """Show all about one job.

    How far it is, the parameters that are not at their defaults, its runs, the last figures, its
    files, and why it failed if it did. --json prints all of it.
    """
    with open_store() as backend:
        record = without_keys(find_job(backend, job))
        runs = backend.list_runs(job_id=record.id)
        is_new = not runs or record.status == "pending"
        last = {} if is_new else backend.latest_values(job_id=record.id)
        events = backend.list_events(run_id=runs[-1].id) if runs else iter(())
        files = result_files(events)
        is_over = record.status in ENDED
        state = "" if is_over else state_of(backend, record, is_remote=is_remote())
        names = file_names(backend, record.validated_params)
    if as_json:
        print_json(plain(record) | {"runs": runs, "last": last, "files": files})
        return
    _print_job(record, state)
    _print_params(record, names)
    error = why_failed(record, runs[-1].error if runs else None)
    # Why the last one failed stands below, in full.
    is_below = runs and error == runs[-1].error is not None
    _print_runs([*runs[:-1], replace(runs[-1], error="below")] if is_below else runs)
    figures = {key: value for key, value in last.items() if as_number(value) is not None}
    known = (key for key in sorted(figures, key=rank_of) if key not in _NO_FIGURES)
    shown = {key: figures[key] for key in known}
    _print_section(f"last figures (`ow events {record.id}` prints all)", _rounded(shown))
    _print_section(
        f"result files (`ow fetch {record.id}` fetches them)",
        {file["path"]: file["file"] for file in files},
    )
    if error:
        click.echo(f"\nerror\n  {one_line(error)}")


def _print_job(job: JobRecord, state: str) -> None:
    click.echo("  ".join(filter(None, (job.id, status_word(job), state))))
    expected = Estimate.of(job.params)
    print_fields(
        {
            "kind": kind_word(job),
            "model": job.model,
            "estimate": expected.words() if expected and job.status not in ENDED else None,
            **(_place(job) if is_remote() else {}),
            "priority": job.priority or None,
            "attempts": job.attempts if job.attempts > 1 else None,
            "after": ", ".join(job.after),
            "label": job.label,
            "not before": local_time(job.not_before) if job.not_before else None,
            "retries": f"{job.retries} of {job.retry.max}" if job.retry else None,
            "stopped at": local_time(job.timeout_at) if job.timeout_at else None,
            "created": f"{local_time(job.created_at)} ({age(job.created_at)} ago)",
            "updated": f"{local_time(job.updated_at)} ({age(job.updated_at)} ago)",
            "command": one_line(job.script, _WIDEST) if job.type == "custom" else None,
        },
        indent="  ",
    )


def _place(job: JobRecord) -> dict[str, object]:
    """Where it may run: of no meaning on this machine."""
    return {
        "cloud type": job.params.get("cloud_type"),
        "VRAM": f"{job.requires_vram_gb} GB" if job.requires_vram_gb else None,
        "hardware": ", ".join(job.allowed_hardware or ()),
        "image": job.docker_image,
        "worker": job.worker_id,
    }


def _print_params(job: JobRecord, names: Mapping[str, str]) -> None:
    """Those that differ from their defaults, and what the job's folder gets."""
    params, defaults = job.validated_params, default_params(job)
    usual = [name for name in params if name in defaults and params[name] == defaults[name]]
    # Loss and model were said above, and a name with the job's id was made for it.
    usual = [name for name in usual if name not in _ALWAYS_SHOWN]
    hidden = {*usual, "loss", "model"}
    name = str(params.get("finetuned_model_id"))
    if "{" in name or job.id in name:
        hidden.add("finetuned_model_id")
    title = "parameters" + (f" ({len(usual)} more at their defaults)" if usual else "")
    chosen = {
        name: one_line(value_words(with_names(params[name], names)), _WIDEST)
        for name in in_order(params, defaults)
        if name not in hidden
    }
    _print_section(title, chosen, limit=_PARAMETERS_SHOWN)
    mounted: Mapping[str, str] = job.params.get("mounted_files") or {}
    _print_section("mounted files", mounted, limit=_MOUNTED_SHOWN)


def _rounded(figures: Mapping[str, Any]) -> dict[str, str]:
    return {key: number_words(as_number(value) or 0, 5) for key, value in figures.items()}


def _print_section(title: str, values: Mapping[str, Any], limit: int = _SHOWN) -> None:
    if not values:
        return
    click.echo(f"\n{title}")
    print_fields(dict(list(values.items())[:limit]), indent="  ")
    if len(values) > limit:
        click.echo(f"  … and {len(values) - limit} more")


def _print_runs(runs: Sequence[RunRecord]) -> None:
    if not runs:
        return
    click.echo("\nruns")
    print_table(
        ("run", "attempt", "status", "started", "lasted", "log", "worker", "error"),
        [
            (
                str(run.id),
                str(run.attempt),
                run.status_word,
                local_time(run.created_at),
                age(run.created_at, run.ended_at),
                f"{run.log_bytes} B",
                run.worker_id or "-",
                one_line(run.error or "-"),
            )
            for run in runs[-_SHOWN:]
        ],
    )
