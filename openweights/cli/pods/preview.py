"""`ow cluster --dry-run --jobs FILE`: pods that a file of jobs would get, before there are keys."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openweights.cli.output import read_lines
from openweights.errors import InvalidInputError, OpenWeightsError
from openweights.settings import ClusterSettings, Settings

if TYPE_CHECKING:
    from openweights.cluster.planning.actions import Action
    from openweights.cluster.planning.market import Market
    from openweights.types import JobSpec

USUAL_KIND = "fine_tuning"


def preview(file: Path, cluster: ClusterSettings) -> tuple[list[str], tuple[Action, ...]]:
    """A line for each job, with what it is likely to take, and what a manager would do for them.

    Args:
        file: A line for each job, with what `create` takes, and perhaps its `kind`.

    Raises:
        InvalidInputError: A line is no job; names it, and what is wrong.
    """
    from openweights.client.watching.estimates import Estimate, priced
    from openweights.cluster.planning.limits import Limits
    from openweights.cluster.planning.planner import plan

    specs = dict(prepared(file))
    now = datetime.now(UTC)
    demands = [_demand(name, spec, now) for name, spec in specs.items()]
    limits = Limits(max_workers=cluster.max_workers)
    actions = plan(demands, (), (), limits, _market(cluster, now), now)
    lines: list[str] = []
    for name, spec in specs.items():
        expected = Estimate.of(spec.params)
        words = priced(expected, spec, None).words() if expected else f"{spec.requires_vram_gb} GB"
        lines.append(f"{name}  {spec.model or spec.type}  {words}")
    return lines, actions


def prepared(file: Path) -> Iterator[tuple[str, JobSpec]]:
    """The jobs of a file by their lines, checked as `create` checks them, in a store of their own
    that is gone afterwards.

    Raises:
        InvalidInputError: As `preview`.
    """
    from openweights.client import OpenWeights

    here = Settings.from_env()
    with tempfile.TemporaryDirectory() as home:
        own = Settings(Path(home), image=here.image, vllm_image=here.vllm_image)
        with closing(OpenWeights(settings=own)) as ow:
            for number, row in _rows(file):
                try:
                    yield f"line {number}", _prepare(ow, row)
                except OpenWeightsError as error:
                    raise InvalidInputError(f"{file}:{number}: {error}") from None


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{file}:{number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InvalidInputError(f"{file}:{number}: no object; write what create takes as {{…}}")
        yield number, cast("dict[str, Any]", row)


def _prepare(ow: Any, row: Mapping[str, Any]) -> JobSpec:
    from openweights.client.job_kinds import find_kind, kind_names

    name = str(row.get("kind", USUAL_KIND))
    kind = find_kind(name)
    if kind is None:
        raise InvalidInputError(f"kind: {name!r} is none of {', '.join(kind_names())}")
    return kind(ow).prepare(**{key: value for key, value in row.items() if key != "kind"})


def _demand(name: str, spec: JobSpec, now: datetime) -> Any:
    from openweights.cluster.planning.observation import Demand

    return Demand(
        name,
        spec.docker_image,
        now,
        spec.params["cloud_type"],
        spec.requires_vram_gb,
        spec.allowed_hardware,
        spec.priority,
        usd_left=spec.max_cost_usd,
    )


def _market(cluster: ClusterSettings, now: datetime) -> Market:
    """Prices and stock as RunPod says now, where there is a key; else those of the catalogue."""
    from openweights.cluster.launch import open_runpod
    from openweights.cluster.planning.market import Listing, Market

    stock: Sequence[Listing] = open_runpod(cluster).stock() if cluster.runpod_api_key else []
    return Market().restocked(stock, now)
