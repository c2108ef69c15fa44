"""`ow costs`."""

from __future__ import annotations

from typing import Any, cast

import click

from openweights.cli.output import json_option, note, print_json, print_table
from openweights.settings import Settings

Rows = list[dict[str, Any]]


@click.command()
@click.option(
    "--by",
    type=click.Choice(["job", "worker", "key", "member"]),
    default="job",
    show_default=True,
    help="What the lines are.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Lines at most.",
)
@json_option
def costs(by: str, limit: int, as_json: bool) -> None:
    """Show what pods have cost, in USD.

    Each pod counts from its start until it is known to be gone. What no job accounts for, such as
    booting and waiting, is overhead, of which the jobs that ran there get equal shares. A key has
    spent what its jobs' runs cost, without overhead: that is what its budget is for.
    """
    from contextlib import closing

    from openweights.backends import open_project

    with closing(open_project(Settings.from_env())) as store:
        report = store.cost_report(limit=limit)
    if as_json:
        print_json(report)
        return
    click.echo(
        f"${_usd(report['total_usd'])} in all: ${_usd(report['direct_usd'])} for jobs, "
        f"${_usd(report['overhead_usd'])} overhead"
    )
    if unpriced := report["unpriced_workers"]:
        note(f"without the pods of {unpriced} workers, whose prices are not known")
    columns, rows = _TABLES[by](report)
    if rows:
        print_table(columns, rows[:limit])


def _jobs(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(row["job_id"]),
            str(row["runs"]),
            *(_usd(row[name]) for name in ("direct_usd", "overhead_usd", "usd")),
        ]
        for row in _rows(report, "jobs")
    ]
    return ["job", "runs", "direct", "overhead", "usd"], rows


def _workers(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(row["id"]),
            str(row["provider"]),
            "unknown" if row["price_usd_per_hour"] is None else _usd(row["price_usd_per_hour"]),
            "ended" if row["ended_at"] else "running" if row["started_at"] else "never started",
            _usd(row["usd"]),
        ]
        for row in _rows(report, "workers")
    ]
    return ["worker", "provider", "usd/h", "pod", "usd"], rows


def _keys(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(row["name"]),
            str(row["email"]),
            _usd(row["spent_usd"]),
            "none" if row["budget_usd"] is None else _usd(row["budget_usd"]),
        ]
        for row in _rows(report, "keys")
    ]
    return ["key", "member", "usd", "budget"], rows


def _members(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[str(r["email"]), str(r["jobs"]), _usd(r["usd"])] for r in _rows(report, "members")]
    return ["member", "jobs", "usd"], rows


_TABLES = {"job": _jobs, "worker": _workers, "key": _keys, "member": _members}


def _rows(report: dict[str, Any], name: str) -> Rows:
    return cast(Rows, report[name])


def _usd(value: Any) -> str:
    usd = float(value)
    return f"{usd:.2f}" if usd >= 1 or usd == 0 else f"{usd:.3f}"
