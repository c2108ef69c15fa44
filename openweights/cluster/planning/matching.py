"""Which waiting jobs the workers that are free, or about to be, can take between them.

This is a bipartite matching of jobs with workers, an edge where `takes` says yes. Jobs are added
one by one, in the order in which the store would hand them out, each by an augmenting path (Berge
1957): if a suitable worker is free the job gets it; else a job that holds a suitable worker moves
to another one, whose job may have to move in turn, until the chain ends at a free worker. A job
that is matched once stays matched; only its worker may change.

Why the first come first: sets of jobs that can be matched together are the independent sets of a
transversal matroid (Edmonds and Fulkerson 1965). In a matroid, taking each element in order if the
set stays independent gives a set that is as large as possible, and of all such the first in that
order. So no job is refused for the sake of one that comes later, and no worker stays idle that
could have taken part. Two things follow that make it fast:

- A job for which no augmenting path exists has none later either, because the set only grows; and
  neither has any other job of the same need (`full` in `match_all`).
- Jobs of equal need are interchangeable, and so are workers that take the same jobs. So the graph
  has a node for each `Need` and each `WorkerClass`, with counts (`taken`, `matched`) in place of
  edges: a search costs the number of needs times that of classes, however many jobs and workers
  there are.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from openweights.cluster.planning.fit import Need, takes
from openweights.cluster.planning.hardware import canonical_hardware, known_hardware
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import ANY_IMAGE, Demand, Worker

Wanted = tuple[Demand, Need]


@dataclass(slots=True)
class WorkerClass:
    """Workers that take the same jobs.

    Attributes:
        taken: How many of them are matched with jobs of which need.
    """

    vram_gb: int
    workers: list[Worker] = field(default_factory=list[Worker])
    taken: Counter[Need] = field(default_factory=Counter[Need])
    matched: int = 0

    @property
    def has_room(self) -> bool:
        """Whether a worker of it is still without a job."""
        return self.matched < len(self.workers)


class WorkerClasses:
    """Workers by what they can take."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._classes: dict[tuple[object, ...], WorkerClass] = {}
        self._by_image: dict[str, list[WorkerClass]] = {}
        self._suitable: dict[Need, list[WorkerClass]] = {}

    def add(self, workers: Iterable[Worker]) -> None:
        """Those added first are matched first, and of those added together the cheapest."""
        for worker in sorted(workers, key=lambda worker: worker.usd_per_hour or 0.0):
            vram_gb = usable_gb(worker, self._market)
            key = (
                worker.docker_image,
                worker.cloud_type,
                canonical_hardware(worker.hardware_type),
                vram_gb,
                worker.usd_per_hour,
                worker.is_managed,
                worker.status,
            )
            if key not in self._classes:
                self._classes[key] = WorkerClass(vram_gb)
                image = "" if worker.docker_image in ANY_IMAGE else worker.docker_image
                self._by_image.setdefault(image, []).append(self._classes[key])
                self._suitable.clear()
            self._classes[key].workers.append(worker)

    def suitable(self, need: Need) -> list[WorkerClass]:
        """The classes whose workers can take such a job."""
        found = self._suitable.get(need)
        if found is None:
            # A job without an image runs in any, and a worker without one runs any.
            images = (need.image, "") if need.image else tuple(self._by_image)
            near = [group for image in images for group in self._by_image.get(image, ())]
            found = [group for group in near if takes(group.workers[0], need, group.vram_gb)]
            self._suitable[need] = found
        return found

    def match(self, need: Need) -> bool:
        """Match one more job of this need, moving others to other workers where that helps."""
        # Breadth first from `need` along the alternating paths
        #     need -> class that suits it -> need that holds a worker of it -> class that suits that
        # to the nearest class with a free worker. Two maps are the tree of the search: from which
        # need a class was reached, and which class a need would leave.
        reached_from: dict[int, Need] = {}
        leaves: dict[Need, WorkerClass] = {}
        waiting = deque([need])
        seen = {need}
        while waiting:
            current = waiting.popleft()
            for group in self.suitable(current):
                if id(group) in reached_from:
                    continue
                reached_from[id(group)] = current
                if group.has_room:
                    _augment(group, need, reached_from, leaves)
                    return True
                # No room: whoever holds one of its workers might go elsewhere.
                for other in group.taken:
                    if other not in seen:
                        seen.add(other)
                        leaves[other] = group
                        waiting.append(other)
        return False

    def spare(self) -> list[Worker]:
        """Workers without a job; of workers that are alike those that have been idle longest."""
        left: list[Worker] = []
        for group in self._classes.values():
            by_idleness = sorted(group.workers, key=_idle_since)
            left += by_idleness[: len(group.workers) - group.matched]
        return left


def usable_gb(worker: Worker, market: Market) -> int:
    """Memory that jobs of a worker can use: what it said, or what its hardware surely has while it
    is starting.
    """
    if worker.status != "starting":
        return worker.vram_gb
    found = known_hardware(worker.hardware_type)
    return 0 if found is None else found[0] * market.usable_gb(market.gpus[found[1]])


def match_all(
    demands: Sequence[Wanted], classes: WorkerClasses
) -> tuple[list[Wanted], list[Wanted]]:
    """Match the demands in their order: those for which there is a worker, and the others."""
    full: set[Need] = set()
    met: list[Wanted] = []
    unmet: list[Wanted] = []
    for pair in demands:
        need = pair[1]
        # What could not be added before cannot be added later: nothing is ever taken back.
        if need not in full and classes.match(need):
            met.append(pair)
        else:
            full.add(need)
            unmet.append(pair)
    return met, unmet


def _augment(
    group: WorkerClass,
    root: Need,
    reached_from: dict[int, Need],
    leaves: dict[Need, WorkerClass],
) -> None:
    """Flip the path that ends at `group`, which has room, back to the new job's need `root`: each
    need on it takes a worker of the class after it and gives up one of the class before it. Only
    the last class holds one job more than it did.
    """
    group.matched += 1
    while True:
        need = reached_from[id(group)]
        group.taken[need] += 1
        if need is root:
            return
        group = leaves[need]
        group.taken[need] -= 1
        if not group.taken[need]:
            del group.taken[need]


def _idle_since(worker: Worker) -> datetime:
    return worker.idle_since or worker.created_at
