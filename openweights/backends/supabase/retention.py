"""The verbs of `Backend` about what is removed."""

from __future__ import annotations

from openweights.backends.supabase.verbs import FileVerbs
from openweights.backends.values import checked_keep_s
from openweights.types import Garbage, Sizes

_OBJECTS_AT_ONCE = 100


class RetentionVerbs(FileVerbs):
    """What is decided is decided in SQL; contents are removed here, after their records."""

    @property
    def log_limit_bytes(self) -> int:
        return int(self.identity["log_limit_mb"]) << 20

    def delete_job(self, job_id: str) -> None:
        self.rpc("delete_job", job_id=job_id)

    def collect_garbage(self, keep_s: float, *, dry_run: bool = False) -> Garbage:
        answer = self.rpc("collect_garbage", keep_s=checked_keep_s(keep_s), dry_run=dry_run)
        # All that have no record, also those of a call whose answer was lost.
        places = [self._place(below) for below in answer.pop("objects")]
        while places:
            self._remove(places[:_OBJECTS_AT_ONCE])
            del places[:_OBJECTS_AT_ONCE]
        return Garbage(**answer)

    def sizes(self) -> Sizes:
        return Sizes(**self.rpc("store_sizes"))

    def retention(self) -> tuple[int, float | None]:
        who = self.rpc("whoami")
        return who["log_limit_mb"], who["keep_days"]

    def set_retention(self, log_limit_mb: int, keep_days: float | None) -> None:
        self.rpc("set_retention", log_limit_mb=log_limit_mb, keep_days=keep_days)
