"""How long to leave something alone that keeps failing: hardware that is sold out, an image whose
workers never come up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, cast

from openweights.retry import backoff_s

# Each rest is twice as long as the one before, so that what never works costs next to nothing in
# the long run: in a month some twenty tries.
FIRST_REST_S = 60.0
LONGEST_REST_S = 7 * 24 * 3600.0
PATIENCE = 3  # failures in a row before the first rest

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
        rest_s = 0.0
        if count >= PATIENCE:
            rest_s = backoff_s(count - PATIENCE, FIRST_REST_S, LONGEST_REST_S)
        entry = Failures(count, now + timedelta(seconds=rest_s))
        return Cooldowns(MappingProxyType({**self.failures, key: entry}))

    def succeeded(self, key: Key) -> Cooldowns:
        """It worked: what failed before is forgotten."""
        if key not in self.failures:
            return self
        rest = {name: entry for name, entry in self.failures.items() if name != key}
        return Cooldowns(MappingProxyType(rest))

    def eased(self, keys: Collection[Key], until: datetime) -> Cooldowns:
        """Their rests end at that moment at the latest."""
        eased = {
            key: replace(entry, rests_until=min(entry.rests_until, until))
            for key, entry in self.failures.items()
            if key in keys
        }
        return Cooldowns(MappingProxyType({**self.failures, **eased})) if eased else self

    def is_on_trial(self, key: Key) -> bool:
        """Whether it has failed so often that one try at a time is enough."""
        entry = self.failures.get(key)
        return entry is not None and entry.count >= PATIENCE

    def to_keep(self) -> list[list[object]]:
        """As JSON, for `recalled`."""
        return [
            [*key, entry.count, entry.rests_until.isoformat()]
            for key, entry in sorted(self.failures.items())
        ]

    @classmethod
    def recalled(cls, kept: object, now: datetime) -> Cooldowns:
        """From what `to_keep` has given; what is not understood is left out."""
        found: dict[Key, Failures] = {}
        latest = now + timedelta(seconds=LONGEST_REST_S)
        for line in cast("list[list[Any]]", kept if isinstance(kept, list) else []):
            with contextlib.suppress(ValueError, TypeError):
                kind, name, count, until = line
                moment = min(datetime.fromisoformat(until), latest)
                found[str(kind), str(name)] = Failures(int(count), moment)
        return cls(MappingProxyType(found))

    def rests_until(self, key: Key, now: datetime) -> datetime | None:
        """When it may be tried again; None if it may be now."""
        entry = self.failures.get(key)
        return entry.rests_until if entry is not None and now < entry.rests_until else None
