"""What a job would cost, and when it would run, before it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from openweights.backends.scheduling import check_after
from openweights.backends.values import check_spec
from openweights.client.watching.estimates import Estimate
from openweights.client.watching.progress import duration
from openweights.client.watching.queue import place_in_queue
from openweights.errors import NotFoundError
from openweights.types import JobRecord, JobSpec, JobStatus

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.client import OpenWeights
    from openweights.cluster.planning.quote import Quote

# By name, since the client stands below the cluster; as for the kinds of jobs.
_QUOTES = "openweights.cluster.planning.quote"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What `create` would do.

    Attributes:
        job_id: The id that the job would have.
        status: Of the job of that id that is there already; None for a new one. A pending, running
            or completed one would be returned, and cost nothing more.
        jobs_before: Pending jobs that come first.
        waits_for: What it would wait for.
        offers: Pods that fit it, the first to be asked for first; none on this machine.
        reason: Why there are no offers.
        priced_at: When prices were last heard of; None for those of the catalogue.
        expected_s: How long a run is likely to take, as `like` took; None where no job tells.
        like: The earlier job that tells.
        expected_usd: What that costs, on the hardware of that job; 0 on this machine.
        most_usd: What it can cost at most: `max_cost_usd`, or all runs that it may have, each of
            `max_duration` on the dearest offer; None without a limit.
    """

    job_id: str
    status: JobStatus | None
    jobs_before: int
    waits_for: str
    offers: tuple[Quote, ...]
    reason: str
    priced_at: datetime | None
    expected_s: float | None
    like: str | None
    expected_usd: float | None
    most_usd: float | None

    def __str__(self) -> str:
        return "\n".join(self.words())

    def words(self) -> list[str]:
        """In lines for people."""
        new = "new" if self.status is None else f"exists, {self.status.replace('_', ' ')}"
        if self.status in ("in_progress", "completed"):
            return [f"job {self.job_id}: {new}; `create` gives that one, and nothing new is run"]
        waits = "it waits" if self.status == "pending" else "it would wait"
        lines = [f"job {self.job_id}: {new}", f"{waits} {self.waits_for}"]
        for offer in self.offers[:_SHOWN]:
            sold_out = ", sold out when last asked" if offer.is_sold_out else ""
            where = f"{offer.hardware} on {offer.cloud_type}"
            lines.append(f"pod: {where}, ${offer.usd_per_hour:.2f} an hour{sold_out}")
        if self.reason:
            lines.append(f"no pod: {self.reason}")
        if self.expected_s is None:
            lines.append("how long it takes is not known: no job like it has completed")
        else:
            lines.append(
                f"a run takes about {duration(self.expected_s)}, reckoned from {self.like}"
            )
        if self.expected_usd:
            lines.append(f"expected cost: ${self.expected_usd:.2f}")
        if self.most_usd is not None:
            lines.append(f"at most: ${self.most_usd:.2f}")
        return lines


def make_plan(ow: OpenWeights, spec: JobSpec) -> Plan:
    """Look what there is; nothing is submitted."""
    backend, now = ow.backend, ow.backend.now()
    job = _as_submitted(spec, now)
    check_spec(spec)
    existing = _existing(backend, job.id)
    if existing is None or existing.status not in ("in_progress", "completed"):
        check_after(job.id, job.after, partial(_status, backend), partial(_needs, backend))
    before, waits = place_in_queue(backend, job, is_remote=ow.settings.is_remote)
    offers: tuple[Quote, ...] = ()
    reason, priced_at = "", None
    if backend.team is not None:
        quotes = import_module(_QUOTES).quotes
        offers, reason, priced_at = quotes(job, backend.team.market(), now)
    known = Estimate.of(job.params)
    like = {f"{offer.hardware} {offer.cloud_type}": offer.usd_per_hour for offer in offers}
    is_free, expected_s = backend.team is None, known and known.seconds
    price = 0.0 if is_free else like.get((known and known.hardware) or "")
    dearest = 0.0 if is_free else max(like.values(), default=None)
    longest_s = longest_runs_s(job, backend.queue_state().max_duration_s)
    return Plan(
        job_id=job.id,
        status=existing and existing.status,
        jobs_before=before,
        waits_for=waits,
        offers=offers,
        reason=reason,
        priced_at=priced_at,
        expected_s=expected_s,
        like=known and known.like,
        expected_usd=_cost(expected_s, price),
        most_usd=least(spec.max_cost_usd, _cost(longest_s, dearest)),
    )


def longest_runs_s(job: JobSpec, usual_s: float | None) -> float | None:
    """How long all runs that a job may have can take together; None without a limit.

    Args:
        usual_s: Of a run whose job does not say it.
    """
    each_s = job.max_duration_s or usual_s
    runs = job.max_attempts + (job.retry.max if job.retry else 0)
    return None if each_s is None else runs * each_s


def _as_submitted(spec: JobSpec, now: datetime) -> JobRecord:
    values = {field.name: getattr(spec, field.name) for field in fields(JobSpec)}
    return JobRecord(**values, created_at=now, updated_at=now)


def _existing(backend: Backend, job_id: str) -> JobRecord | None:
    try:
        return backend.get_job(job_id)
    except NotFoundError:
        return None


def _status(backend: Backend, job_id: str) -> JobStatus | None:
    found = _existing(backend, job_id)
    return found and found.status


def _needs(backend: Backend, job_id: str) -> Sequence[str]:
    found = _existing(backend, job_id)
    return found.after if found else ()


def _cost(seconds: float | None, usd_per_hour: float | None) -> float | None:
    if seconds is None or usd_per_hour is None:
        return None
    return seconds / 3600 * usd_per_hour


def least(*amounts: float | None) -> float | None:
    """Of those that are given."""
    return min((amount for amount in amounts if amount is not None), default=None)
