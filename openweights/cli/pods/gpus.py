"""`ow gpus`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from openweights.cli.output import json_option, note, print_json, print_table
from openweights.errors import InvalidInputError
from openweights.gpu_catalogue import MARGIN_GB
from openweights.settings import ClusterSettings


@click.command()
@click.option(
    "--vram-gb",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Only those with so much memory, as they are sold.",
)
@json_option
def gpus(vram_gb: int, as_json: bool) -> None:
    """List the GPUs that pods can have, the cheapest first.

    Memory as they are sold, and the price of an hour on either tier. A job can use some GB less,
    which `requires_vram_gb` is compared with: that is said below, or shown where it differs. With
    RUNPOD_API_KEY set, prices and stock are what RunPod says now; else prices are those that were
    seen on the days said below.
    """
    known = _rows()
    rows = [row for row in known if row["vram_gb"] >= vram_gb]
    if as_json:
        print_json(rows)
        return
    if not rows:
        most = max(known, key=lambda row: row["vram_gb"])
        raise InvalidInputError(
            f"--vram-gb: no GPU has {vram_gb} GB; the largest is {most['gpu']} with "
            f"{most['vram_gb']} GB. '2x {most['gpu']}' asks for two in one pod"
        )
    names = ("gpu", "memory GB", "usable GB", "secure $/h", "community $/h", "stock")
    cells = [_cells(row) for row in rows]
    usual = all(row["vram_gb"] - row["usable_gb"] == MARGIN_GB for row in rows)
    left_out = ({"usable GB"} if usual else set[str]()) | (
        set[str]() if any(line[-1] != "-" for line in cells) else {"stock"}
    )
    kept = [place for place, name in enumerate(names) if name not in left_out]
    print_table([names[place] for place in kept], [[line[p] for p in kept] for line in cells])
    if usual:
        note(
            f"a job can surely use {MARGIN_GB} GB less than the memory of each: for a card of 80 "
            f"ask for requires_vram_gb={80 - MARGIN_GB}"
        )
    note(_seen({row["seen_on"] for row in rows}))
    note("a name such as '2x H100S' asks for several; without one the cheapest that fits is taken")


def _seen(days: set[str]) -> str:
    first, last = min(days), max(days)
    when = f"on {first}" if first == last else f"from {first} to {last}"
    return f"prices were seen {when}"


def _rows() -> list[dict[str, Any]]:
    from openweights.cluster.launch import open_runpod
    from openweights.cluster.planning.market import Listing, Market

    now, cluster = datetime.now(UTC), ClusterSettings.from_env()
    listings: list[Listing] = open_runpod(cluster).stock() if cluster.runpod_api_key else []
    market = Market().restocked(listings, now)
    stock = {(listing.gpu_id, listing.cloud): listing.stock for listing in listings}
    rows: list[dict[str, Any]] = [
        {
            "gpu": gpu.key,
            "name": gpu.gpu_id,
            "vram_gb": gpu.vram_gb,
            "usable_gb": market.usable_gb(gpu),
            "secure_usd": gpu.secure_usd,
            "community_usd": gpu.community_usd,
            "secure_stock": stock.get((gpu.gpu_id, "SECURE")),
            "community_stock": stock.get((gpu.gpu_id, "COMMUNITY")),
            "seen_on": gpu.seen_on.isoformat(),
        }
        for gpu in market.gpus.values()
    ]
    return sorted(rows, key=lambda row: row["secure_usd"] or row["community_usd"] or 0.0)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def usd(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    levels = [f"{tier} {row[f'{tier}_stock']}" for tier in ("secure", "community")]
    stock = ", ".join(level.lower() for level in levels if not level.endswith("None"))
    memory = (f"{row['vram_gb']}", f"{row['usable_gb']}")
    prices = usd(row["secure_usd"]), usd(row["community_usd"])
    return (row["gpu"], *memory, *prices, stock or "-")
