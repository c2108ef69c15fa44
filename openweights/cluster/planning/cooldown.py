"""How long to leave something alone that keeps failing: hardware that is sold out, an image whose
workers never come up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType

LADDER_S = tuple(60 * minutes for minutes in (1, 2, 5, 10, 20, 40, 80, 160, 360))
"""How long each further rest is; the last one repeats."""
PATIENCE = 3
"""Failures in a row before the first rest."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Failures:
    """Attributes:
    count: Failures in a row.
    rests_until: When it may be tried again.
    """

    count: int
    rests_until: datetime


@dataclass(frozen=True, slots=True)
class Cooldowns:
    """Failures in a row, by key. Immutable."""

    failures: Mapping[Key, Failures] = field(default_factory=lambda: MappingProxyType({}))

    def failed(self, key: Key, now: datetime) -> Cooldowns:
        """One more failure. A failure during a rest, asked for before it began, does not extend
        it.
        """
        before = self.failures.get(key)
        if before is not None and now < before.rests_until:
            return self
        count = before.count + 1 if before else 1
        step = count - PATIENCE
        rest_s = 0 if step < 0 else LADDER_S[min(step, len(LADDER_S) - 1)]
        entry = Failures(count, now + timedelta(seconds=rest_s))
        return Cooldowns(MappingProxyType({**self.failures, key: entry}))

    def succeeded(self, key: Key) -> Cooldowns:
        """It worked: what failed before is forgotten."""
        if key not in self.failures:
            return self
        rest = {name: entry for name, entry in self.failures.items() if name != key}
        return Cooldowns(MappingProxyType(rest))

    def rests_until(self, key: Key, now: datetime) -> datetime | None:
        """When it may be tried again; None if it may be now."""
        entry = self.failures.get(key)
        return entry.rests_until if entry is not None and now < entry.rests_until else None
