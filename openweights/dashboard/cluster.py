"""Who works for a store and what that costs: workers and their pods, what waits and why, what was
spent, keys and members. On one machine there are workers and a queue alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any, cast

from openweights.backends.base import Backend, TeamStore
from openweights.client.watching.queue import QueueView, in_order
from openweights.cluster.planning.actions import ReportJobs
from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.planner import plan
from openweights.cluster.store import ClusterStore
from openweights.cluster.watch import Watch
from openweights.errors import ConfigurationError, InvalidInputError
from openweights.types import JobRecord, PendingRow, WorkerRecord, WorkerRow

_MOST_ROWS = 200
_COST_PAGE = 500
DAYS = 30


def cluster_state(backend: Backend) -> dict[str, Any]:
    """`{workers, usd_per_hour, queue: [{id, model, since, owner, reason}], waiting}`; the first
    workers and waiting jobs of many. Who submitted a job is told to a project's admins.
    """
    queue = QueueView.read(backend, is_remote=backend.team is not None)
    running, pending = queue.running, in_order(queue.pending)
    if backend.team is None:
        workers: Sequence[WorkerRecord] = backend.list_workers()
        told, rows = dict[str, str](), dict[str, PendingRow]()
    else:
        workers = _store(backend).worker_rows()
        is_admin = backend.team.identity.get("role") == "admin"
        rows = {row.job.id: row for row in _store(backend).pending_jobs()} if is_admin else {}
        told = planners_reasons(backend.team, workers, pending, rows, running)
    reasons = queue.first_reasons(_MOST_ROWS) | told
    held = {job.worker_id: job.id for job in running if job.worker_id is not None}
    prices = [w.price_usd_per_hour or 0.0 for w in workers if isinstance(w, WorkerRow)]
    return {
        "workers": [_worker(worker, held.get(worker.id)) for worker in workers[:_MOST_ROWS]],
        "usd_per_hour": sum(prices) if prices else None,
        "waiting": len(pending),
        "queue": [
            {
                "id": job.id,
                "model": job.model,
                "since": job.updated_at.isoformat(),
                "owner": rows[job.id].owner if job.id in rows else "",
                "reason": reasons.get(job.id, ""),
            }
            for job in pending[:_MOST_ROWS]
        ],
    }


def _store(backend: Backend) -> ClusterStore:
    return cast("ClusterStore", backend.team)


def planners_reasons(
    team: TeamStore,
    workers: Sequence[WorkerRow],
    pending: Sequence[JobRecord],
    known: Mapping[str, PendingRow],
    running: Sequence[JobRecord],
) -> dict[str, str]:
    """What the cluster's planner says of jobs for which no pod can be started.

    Args:
        known: Of each job, for an admin, what may be spent on it; the manager's memory of what
            keeps failing counts then, too.
    """
    now, market = team.now(), Market()
    if known:
        market = market.recalled(_store(team).manager_state(), now)
    provider = next((row.provider for row in workers if row.provider), "runpod")
    rows = [known.get(job.id) or PendingRow(job) for job in pending]
    seen = Watch(lambda _: None, provider).see(now, None, workers, rows, running)
    found: dict[str, str] = {}
    for report in plan(seen.jobs, seen.workers, None, Limits(), market, now):
        if isinstance(report, ReportJobs):
            found |= dict.fromkeys(report.job_ids, report.reason)
    return found


def _worker(worker: WorkerRecord, job_id: str | None) -> dict[str, Any]:
    row = worker if isinstance(worker, WorkerRow) else None
    return {
        "id": worker.id,
        "status": worker.status,
        "hardware": worker.hardware_type,
        "vram_gb": worker.vram_gb,
        "cloud": worker.cloud_type,
        "pod": worker.pod_id,
        "job": job_id,
        "usd_per_hour": row.price_usd_per_hour if row else None,
        "created": worker.created_at.isoformat(),
        "pinged": worker.pinged_at.isoformat(),
    }


# ---- costs ---------------------------------------------------------------------------------------


def costs(team: TeamStore) -> dict[str, Any]:
    """The project's report of costs, and `days`: `[{day, usd}]` of the last 30."""
    report = team.cost_report(limit=_COST_PAGE)
    now = team.now()
    pods = list(report["workers"])
    while len(pods) % _COST_PAGE == 0 and pods and _is_recent(pods[-1], now):
        page = team.cost_report(limit=_COST_PAGE, offset=len(pods))["workers"]
        if not page:
            break
        pods += page
    rest = {name: value for name, value in report.items() if name != "workers"}
    return {**rest, "jobs": report["jobs"][:_MOST_ROWS], "days": costs_by_day(pods, now)}


def _is_recent(pod: Mapping[str, Any], now: datetime) -> bool:
    started = pod["started_at"]
    return started is None or now - datetime.fromisoformat(started) < timedelta(days=DAYS)


def costs_by_day(
    pods: Iterable[Mapping[str, Any]], now: datetime, days: int = DAYS
) -> list[dict[str, Any]]:
    """USD of each of the last days in UTC, today last: what pods with a known price cost while
    they ran.

    Args:
        pods: Of each `started_at`, `ended_at` (None while it runs) and `price_usd_per_hour`.
    """
    today = datetime.combine(now.astimezone(UTC).date(), time(), UTC)
    starts = [today - timedelta(days=days - 1 - place) for place in range(days)]
    usd = defaultdict[datetime, float](float)
    for pod in pods:
        if pod["started_at"] is None or pod["price_usd_per_hour"] is None:
            continue
        began = datetime.fromisoformat(pod["started_at"])
        ended = datetime.fromisoformat(pod["ended_at"]) if pod["ended_at"] else now
        for start in starts:
            hours = (min(ended, start + timedelta(days=1)) - max(began, start)) / timedelta(hours=1)
            usd[start] += max(hours, 0.0) * float(pod["price_usd_per_hour"])
    return [{"day": f"{start:%Y-%m-%d}", "usd": usd[start]} for start in starts]


# ---- keys and members ----------------------------------------------------------------------------


def team_state(team: TeamStore) -> dict[str, Any]:
    """`{role, keys, members}`; keys and members are told to admins alone."""
    identity = team.identity
    state: dict[str, Any] = {"role": identity.get("role"), "organization": identity["organization"]}
    if identity.get("role") != "admin":
        return state
    return state | {
        "keys": [
            {
                "id": key.id,
                "name": key.name,
                "prefix": key.prefix,
                "role": key.role,
                "email": key.email,
                "created": key.created_at.isoformat(),
                "expires": _iso(key.expires_at),
                "revoked": _iso(key.revoked_at),
                "used": _iso(key.last_used_at),
                "spent_usd": key.spent_usd,
                "budget_usd": key.budget_usd,
            }
            for key in team.list_keys()
        ],
        "members": [
            {"id": m.id, "email": m.email, "role": m.role, "since": m.created_at.isoformat()}
            for m in team.list_members()
        ],
    }


def change_team(team: TeamStore, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What an admin's page asks for; what a key may not do, the store refuses.

    Verbs: `create-key` with `name`, `role` and perhaps `member_id`, `budget_usd`, `days`;
    `revoke-key` with `id`; `set-budget` with `id` and `budget_usd`; `add-member` with `email` and
    `role`; `remove-member` with `id`.

    Returns:
        `{id, key}` of a new key, whose text is told this once; else nothing.
    """
    match verb:
        case "create-key":
            days = _amount(body, "days")
            made = team.create_key(
                _text(body, "name"),
                _text(body, "role"),
                member_id=body.get("member_id") or None,
                budget_usd=_amount(body, "budget_usd"),
                expires_at=None if days is None else team.now() + timedelta(days=days),
            )
            return {"id": made.id, "key": made.key}
        case "revoke-key":
            team.revoke_key(_text(body, "id"))
        case "set-budget":
            team.set_budget(_text(body, "id"), _amount(body, "budget_usd"))
        case "add-member":
            team.add_member(_text(body, "email"), _text(body, "role"))
        case "remove-member":
            team.remove_member(_text(body, "id"))
        case _:
            raise InvalidInputError(f"{verb!r} is nothing that can be done to a team")
    return {}


def team_of(backend: Backend) -> TeamStore:
    """The project's team; raises ConfigurationError for the store on this machine."""
    if backend.team is None:
        raise ConfigurationError("the store on this machine has no costs, keys and members")
    return backend.team


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{name}: is missing")
    return value.strip()


def _amount(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise InvalidInputError(f"{name}: must be a number from 0, or nothing")
    return float(value)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
