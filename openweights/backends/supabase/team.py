"""What an organization asks of a project about itself: members, and secrets as sealed boxes."""

from __future__ import annotations

from openweights.backends.supabase.connection import Project
from openweights.backends.supabase.records import from_row, plain_text
from openweights.types import MemberRecord, SecretRecord


class TeamVerbs(Project):
    """Members and secrets. Who may do what is the project's to say."""

    def rename_organization(self, name: str) -> None:
        self.rpc("rename_organization", name=plain_text(name))

    def list_members(self) -> list[MemberRecord]:
        return [from_row(MemberRecord, row) for row in self.rpc("list_members")]

    def add_member(self, email: str, role: str) -> MemberRecord:
        """A new member; who is one already gets the role."""
        return from_row(MemberRecord, self.rpc("add_member", email=plain_text(email), role=role))

    def remove_member(self, member_id: str) -> None:
        """The member's keys are dead from then on."""
        self.rpc("remove_member", member_id=member_id)

    # ---- secrets

    def secrets_key(self) -> str | None:
        """The public key that secrets are sealed with; None before an admin has made one."""
        return self.rpc("secrets_key")

    def set_secrets_key(self, public_key: str) -> None:
        """Raises InvalidStateError while there are secrets that only the present key opens."""
        self.rpc("set_secrets_key", public_key=public_key)

    def set_secret(self, name: str, sealed: str) -> None:
        self.rpc("set_secret", name=name, sealed=sealed)

    def delete_secret(self, name: str) -> bool:
        """Whether there was one."""
        return self.rpc("delete_secret", name=name)

    def list_secrets(self) -> list[SecretRecord]:
        return [from_row(SecretRecord, row) for row in self.rpc("list_secrets")]

    def job_secrets(self, run_id: int) -> dict[str, str]:
        """Sealed boxes of the secrets that the run's job names, for the worker that holds it."""
        return self.rpc("job_secrets", run_id=run_id)
