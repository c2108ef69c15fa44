"""`ow show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from openweights.cli.jobs.ls import kind, validated_params
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
from openweights.cli.store import find_job, open_store
from openweights.types import EventRecord, JobRecord, RunRecord


@click.command()
@click.argument("job")
@json_option
def show(job: str, as_json: bool) -> None:
    """Show all about one job.

    Its parameters, runs, last metrics, result files, and why it failed if it did.
    """
    with open_store() as backend:
        record = find_job(backend, job)
        runs = backend.list_runs(job_id=record.id)
        last = backend.latest_values(job_id=record.id) if runs else {}
        events = backend.list_events(run_id=runs[-1].id) if runs else iter(())
        files = _result_files(events)
    if as_json:
        print_json(plain(record) | {"runs": runs, "last": last, "files": files})
        return
    _print_job(record)
    _print_section("parameters", validated_params(record))
    _print_section("mounted files", record.params.get("mounted_files") or {})
    _print_runs(runs)
    _print_section(
        "last values", {key: value for key, value in last.items() if key not in ("file", "path")}
    )
    if files:
        click.echo("\nresult files")
        print_fields({file["path"]: file["file"] for file in files}, indent="  ")
    error = runs[-1].error if runs and record.status == "failed" else None
    if error:
        click.echo(f"\nerror\n  {one_line(error)}")


def _result_files(events: Iterator[EventRecord]) -> list[dict[str, str]]:
    """The files of a run by their paths, the last one logged for each path."""
    found: dict[str, str] = {}
    for event in events:
        file, path = event.data.get("file"), event.data.get("path")
        if isinstance(file, str) and isinstance(path, str):
            found[path] = file
    return [{"path": path, "file": file} for path, file in sorted(found.items())]


def _print_job(job: JobRecord) -> None:
    click.echo(f"{job.id}  {job.status}")
    print_fields(
        {
            "type": job.type,
            "kind": kind(job),
            "model": job.model,
            "cloud type": job.params.get("cloud_type"),
            "VRAM": f"{job.requires_vram_gb} GB" if job.requires_vram_gb else None,
            "hardware": ", ".join(job.allowed_hardware or ()),
            "image": job.docker_image,
            "priority": job.priority or None,
            "attempts": f"{job.attempts}; it fails once {job.max_attempts} have lost their worker",
            "worker": job.worker_id,
            "stopped at": local_time(job.timeout_at) if job.timeout_at else None,
            "created": f"{local_time(job.created_at)} ({age(job.created_at)} ago)",
            "updated": f"{local_time(job.updated_at)} ({age(job.updated_at)} ago)",
            "command": one_line(job.script),
        },
        indent="  ",
    )


def _print_section(title: str, values: Mapping[str, Any]) -> None:
    if values:
        click.echo(f"\n{title}")
        print_fields(values, indent="  ")


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
                run.status,
                local_time(run.created_at),
                age(run.created_at, run.ended_at),
                f"{run.log_bytes} B",
                run.worker_id or "-",
                one_line(run.error or "-"),
            )
            for run in runs
        ],
    )
