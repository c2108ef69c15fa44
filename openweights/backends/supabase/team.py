"""What a project does beyond what every store can: a team's members, keys, secrets and costs
(`openweights.backends.base.TeamStore`), and the pods of its workers
(`openweights.cluster.store.ClusterStore`), where the verbs are described.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from openweights.backends.supabase.connection import PAGE_ROWS, Project, Query
from openweights.backends.supabase.records import (
    Row,
    columns,
    from_row,
    from_rows,
    moment_text,
    worker_json,
)
from openweights.backends.values import readable
from openweights.json_values import storable
from openweights.types import (
    JobRecord,
    KeyRecord,
    MemberRecord,
    NewKey,
    PendingRow,
    SecretRecord,
    WorkerRow,
    WorkerSpec,
)


class TeamVerbs(Project):
    """`TeamStore`."""

    def rename_organization(self, name: str) -> None:
        self.rpc("rename_organization", name=storable(name))

    def list_members(self) -> list[MemberRecord]:
        return from_rows(MemberRecord, self.rpc("list_members"))

    def add_member(self, email: str, role: str) -> MemberRecord:
        return from_row(MemberRecord, self.rpc("add_member", email=storable(email), role=role))

    def remove_member(self, member_id: str) -> None:
        self.rpc("remove_member", member_id=member_id)

    def create_key(
        self,
        name: str,
        role: str,
        *,
        expires_at: datetime | None = None,
        worker_id: str | None = None,
        budget_usd: float | None = None,
        member_id: str | None = None,
    ) -> NewKey:
        moment = None if expires_at is None else moment_text(expires_at)
        answer = self.rpc(
            "create_key",
            name=storable(name),
            role=role,
            expires_at=moment,
            worker_id=worker_id,
            budget_usd=budget_usd,
            member_id=member_id,
        )
        return from_row(NewKey, answer)

    def list_keys(self) -> list[KeyRecord]:
        return from_rows(KeyRecord, self.rpc("list_keys"))

    def revoke_key(self, key_id: str) -> None:
        self.rpc("revoke_key", key_id=key_id)

    def set_budget(self, key_id: str, usd: float | None) -> None:
        self.rpc("set_budget", key_id=key_id, usd=usd)

    def cost_report(self, *, limit: int = 100, offset: int = 0) -> dict[str, Any]:
        return self.rpc("cost_report", limit=limit, offset=offset)

    def market(self) -> dict[str, Any]:
        return self.rpc("market") or {}

    def secrets_key(self) -> str | None:
        return self.rpc("secrets_key")

    def set_secrets_key(self, public_key: str) -> None:
        self.rpc("set_secrets_key", public_key=public_key)

    def set_secret(self, name: str, sealed: str) -> None:
        self.rpc("set_secret", name=name, sealed=sealed)

    def delete_secret(self, name: str) -> bool:
        return self.rpc("delete_secret", name=name)

    def list_secrets(self) -> list[SecretRecord]:
        return from_rows(SecretRecord, self.rpc("list_secrets"))

    def job_secrets(self, run_id: int) -> dict[str, str]:
        return self.rpc("job_secrets", run_id=run_id)


class ClusterVerbs(Project):
    """`ClusterStore`, but for keys."""

    def pending_jobs(self) -> list[PendingRow]:
        found: list[PendingRow] = []
        seen = 0
        while True:
            rows = self.rpc("pending_jobs", limit=PAGE_ROWS, offset=seen)
            seen += len(rows)
            found += readable(_pending_row, rows, "a pending job")
            if len(rows) < PAGE_ROWS:
                return found

    def worker_rows(self, worker_ids: Sequence[str] | None = None) -> list[WorkerRow]:
        def narrow(query: Query) -> Query:
            if worker_ids is None:
                # Also the terminated ones whose pod is not known to be gone: it may cost money.
                return query.or_("status.neq.terminated,and(pod_id.not.is.null,ended_at.is.null)")
            return query.in_("id", list(worker_ids))

        pages = self._pages("workers", columns(WorkerRow), narrow, after="")
        return [row for page in pages for row in from_rows(WorkerRow, page)]

    def create_worker(
        self, worker: WorkerSpec, *, provider: str, price_usd_per_hour: float | None
    ) -> None:
        self.rpc(
            "create_worker",
            worker=worker_json(worker),
            price_usd_per_hour=price_usd_per_hour,
            provider=provider,
        )

    def set_worker_pod(self, worker_id: str, pod_id: str, price_usd_per_hour: float | None) -> None:
        self.rpc(
            "set_worker_pod",
            worker_id=worker_id,
            pod_id=pod_id,
            price_usd_per_hour=price_usd_per_hour,
        )

    def manager_state(self) -> dict[str, Any]:
        return self.rpc("manager_state")

    def set_manager_state(self, state: Mapping[str, Any]) -> None:
        self.rpc("set_manager_state", state=dict(state))

    def end_worker_pod(self, worker_id: str) -> None:
        self.rpc("end_worker_pod", worker_id=worker_id)


def _pending_row(row: Row) -> PendingRow:
    return PendingRow(from_row(JobRecord, row["job"]), row["owner"], row["usd_left"])
