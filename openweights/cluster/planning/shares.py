"""Who gets the next worker when there are not enough for all.

Higher priority first. Within a priority the owner who holds the fewest workers, and of that owner's
groups the one that holds the fewest; among equals who has waited longest. So nobody's thousand jobs
shut out somebody else's one.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from openweights.cluster.planning.fit import Group, Need
from openweights.cluster.planning.matching import Wanted
from openweights.cluster.planning.observation import Demand


@dataclass(slots=True)
class Holdings:
    """How many workers are at work, or reserved, for whom."""

    by_owner: Counter[str] = field(default_factory=Counter[str])
    by_group: Counter[tuple[str, Group]] = field(default_factory=Counter[tuple[str, Group]])

    def add(self, demand: Demand, need: Need) -> None:
        """One more worker for this owner and group."""
        self.by_owner[demand.owner] += 1
        self.by_group[demand.owner, need.group] += 1


def in_turn(unmet: Sequence[Wanted], holdings: Holdings) -> Iterator[Wanted]:
    """The demands in the order in which they shall get workers.

    Args:
        unmet: By falling priority, those who have waited longest first.
        holdings: Counted on for each demand that is taken.
    """
    for _, level in groupby(unmet, key=lambda pair: pair[0].priority):
        yield from _level(level, holdings)


def _level(level: Iterable[Wanted], holdings: Holdings) -> Iterator[Wanted]:
    queues: dict[str, dict[Group, deque[Wanted]]] = {}
    for demand, need in level:
        groups = queues.setdefault(demand.owner, {})
        groups.setdefault(need.group, deque()).append((demand, need))
    # Positions break ties: owners and groups are in the order of who came first.
    owners = [(holdings.by_owner[owner], i, owner) for i, owner in enumerate(queues)]
    waiting = {
        owner: [(holdings.by_group[owner, group], i, group) for i, group in enumerate(groups)]
        for owner, groups in queues.items()
    }
    heapq.heapify(owners)
    for heap in waiting.values():
        heapq.heapify(heap)
    while owners:
        _, i, owner = heapq.heappop(owners)
        _, j, group = heapq.heappop(waiting[owner])
        queue = queues[owner][group]
        demand, need = queue.popleft()
        holdings.add(demand, need)
        yield demand, need
        if queue:
            heapq.heappush(waiting[owner], (holdings.by_group[owner, group], j, group))
        if waiting[owner]:
            heapq.heappush(owners, (holdings.by_owner[owner], i, owner))
