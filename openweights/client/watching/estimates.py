"""What a job is likely to take, said before it has run: memory, time and price.

The time is that of earlier jobs of the same model and loss in the same store: what their runs took
beside their steps, and their steps, by the tokens of each. Where no such job has completed, nobody
knows. What is estimated is kept in the job's `params`, for whoever looks at it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from openweights.client.watching.progress import duration, read_progress
from openweights.gpu_catalogue import (
    CATALOGUE,
    Offer,
    clouds_of,
    fitting_offers,
    make_offers,
    surely_usable_gb,
)
from openweights.gpu_names import gpu_key
from openweights.types import CLOUD_TYPES, JobRecord, JobSpec

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_LOOKED_AT = 10  # earlier jobs, the newest first


@dataclass(frozen=True, slots=True)
class Work:
    """What a job has to do.

    Attributes:
        steps: Optimizer steps.
        tokens: About how many a step reads and writes, by which steps are compared.
    """

    steps: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an earlier job was.

    Attributes:
        job_id: Which one.
        hardware: That it ran on, such as "1x H100S" or "cpu".
        seconds_per_token: Of its steps.
        other_s: What it took beside them: loading, measuring, storing.
    """

    job_id: str
    hardware: str
    seconds_per_token: float
    other_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job is likely to take.

    Attributes:
        steps, tokens: As of `Work`.
        vram_gb: GPU memory that it asks for; None on this machine.
        seconds: None where no earlier job tells.
        like: The earlier job that tells.
        hardware: What it would run on: the cheapest pod that fits, or what the earlier job had.
        usd_per_hour, usd: Of that pod, by the catalogue; None on this machine.
    """

    steps: int
    tokens: int
    vram_gb: int | None = None
    seconds: float | None = None
    like: str | None = None
    hardware: str | None = None
    usd_per_hour: float | None = None
    usd: float | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Estimate | None:
        """What was estimated for a job with these `params`; None for jobs that nobody estimates."""
        if not isinstance(params.get("estimate"), Mapping):
            return None
        kept = cast("Mapping[str, Any]", params["estimate"])
        if not {"steps", "tokens"} <= kept.keys():
            return None
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in kept.items() if name in known})

    def to_keep(self) -> dict[str, Any]:
        """For the job's `params`, as JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def time_words(self) -> str:
        """As in `about 2m50s, reckoned from ftjob-…`; empty where nobody knows."""
        return (
            ""
            if self.seconds is None
            else f"about {duration(self.seconds)}, reckoned from {self.like}"
        )

    def __str__(self) -> str:
        return self.words()

    def words(self) -> str:
        """As in `32 steps · about 2m50s, as ftjob-… was · 24 GB · about $0.04 on 1x A40`."""
        parts = [f"{self.steps:,} step{'' if self.steps == 1 else 's'}"]
        if time := self.time_words():
            parts.append(time)
        if self.vram_gb:
            parts.append(f"{self.vram_gb} GB of GPU memory")
        if self.usd is not None:
            parts.append(f"about ${self.usd:.2f} on {self.hardware}")
        elif self.usd_per_hour is not None:
            parts.append(f"${self.usd_per_hour:.2f} an hour on {self.hardware}")
        return " · ".join(parts)


def estimate(backend: Backend, spec: JobSpec, work: Work, *, is_remote: bool) -> Estimate:
    """What `spec` is likely to take, with what is known of earlier jobs and of prices."""
    pace = earlier_pace(backend, spec)
    seconds = pace and pace.other_s + work.steps * work.tokens * pace.seconds_per_token
    found = Estimate(work.steps, work.tokens, seconds=seconds, like=pace and pace.job_id)
    return priced(found, spec, pace) if is_remote else found


def priced(found: Estimate, spec: JobSpec, pace: Pace | None) -> Estimate:
    """With memory and price of the pod that it would get: hardware of the kind that the earlier job
    had, if it may run there, else the cheapest that fits.
    """
    offers = possible_offers(spec)
    like = [offer for offer in offers if pace and offer.hardware_type == pace.hardware]
    offer = min(like or offers, key=lambda offer: offer.usd_per_hour, default=None)
    # Another GPU is faster or slower, nobody knows how much.
    seconds = found.seconds if like else None
    usd = seconds and offer and seconds / 3600 * offer.usd_per_hour
    return Estimate(
        found.steps,
        found.tokens,
        vram_gb=spec.requires_vram_gb,
        seconds=seconds,
        like=found.like if like else None,
        hardware=offer and f"{offer.hardware_type} {offer.cloud}",
        usd_per_hour=offer and offer.usd_per_hour,
        usd=usd or None,
    )


def possible_offers(spec: JobSpec) -> list[Offer]:
    """Pods that fit it, by the catalogue."""
    cloud = spec.params.get("cloud_type")
    cloud_type = cloud if cloud in CLOUD_TYPES else "SECURE"
    if spec.allowed_hardware is None:
        gpus = CATALOGUE.values()
        return fitting_offers(gpus, spec.requires_vram_gb, cloud_type, surely_usable_gb)
    found: list[Offer] = []
    for hardware in spec.allowed_hardware:
        count, _, name = hardware.partition("x ")
        key = gpu_key(name)
        if key is not None and clouds_of(cloud_type):
            found += make_offers([CATALOGUE[key]], int(count), cloud_type, surely_usable_gb)
    return [offer for offer in found if offer.vram_gb >= spec.requires_vram_gb]


# ---- earlier jobs --------------------------------------------------------------------------------


def earlier_pace(backend: Backend, spec: JobSpec) -> Pace | None:
    """How fast the last completed job of the same model and loss was; None if there is none."""
    params = spec.params["validated_params"]
    same = {name: params[name] for name in ("model", "loss") if name in params}
    where = {"validated_params": same}
    jobs = backend.list_jobs(statuses=["completed"], where=where, limit=_LOOKED_AT)
    return next(_paces(backend, jobs), None)


def _paces(backend: Backend, jobs: Iterable[JobRecord]) -> Iterator[Pace]:
    for job in jobs:
        before = Estimate.of(job.params)
        progress = read_progress(backend, job)
        run = next(iter(backend.list_runs(job_id=job.id, limit=1)), None)
        rate = progress.seconds_per_step
        if before is None or not rate or run is None or run.ended_at is None:
            continue
        whole_s = (run.ended_at - run.created_at).total_seconds()
        other_s = max(0.0, whole_s - rate * (progress.step - progress.from_step))
        hardware = next(
            (w.hardware_type for w in backend.list_workers() if w.id == run.worker_id), "cpu"
        )
        yield Pace(job.id, hardware, rate / max(before.tokens, 1), other_s)
