"""How long the planner thinks: `python -m tests.benchmarks.plan`.

10,000 pending jobs of 180 groups and 40 owners, 500 workers of which a fifth is idle, a tenth
starting and the rest busy, and their pods. Once with slots for 100 more workers, and once at the
limit, where the planner looks for workers to make room. The bar is 100 ms for the median pass. On a
machine that does other work as well, look at the CPU time, too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from datetime import UTC, datetime, timedelta

from openweights.cluster.planning.limits import Limits
from openweights.cluster.planning.market import Market
from openweights.cluster.planning.observation import Demand, Pod, Worker, pod_name
from openweights.cluster.planning.planner import plan
from openweights.gpu_catalogue import CATALOGUE, CLOUDS

BAR_MS = 100.0
JOBS, WORKERS, OWNERS = 10_000, 500, 40
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
IMAGES = tuple(f"openweights/image-{number}:1.0" for number in range(5))
HARDWARE = (None, ("1x A100S", "1x A100"), ("1x H100S",), ("2x H200",))
VRAM_GB = (0, 24, 40)


def demand(number: int, chance: random.Random) -> Demand:
    """A job of one of 5 images x 3 cloud types x 4 hardware lists x 3 sizes."""
    return Demand(
        f"job-{number}",
        chance.choice(IMAGES),
        NOW - timedelta(seconds=chance.randrange(36_000)),
        chance.choice(("SECURE", "COMMUNITY", "ALL")),
        chance.choice(VRAM_GB),
        chance.choice(HARDWARE),
        chance.choice((0, 0, 0, 1)),
        f"owner-{chance.randrange(OWNERS)}",
        chance.choice((None, None, 5.0, 20.0)),
    )


def worker(number: int, chance: random.Random) -> Worker:
    """A fifth idle, a tenth starting, the rest busy."""
    gpu = CATALOGUE[chance.choice(("A100", "A100S", "H100S", "H200"))]
    state = chance.random()
    since = NOW - timedelta(seconds=chance.randrange(10, 7_200))
    is_idle, is_starting = state < 0.2, 0.2 <= state < 0.3
    return Worker(
        f"worker-{number}",
        "starting" if is_starting else "active",
        chance.choice(IMAGES),
        f"1x {gpu.key}",
        NOW - timedelta(seconds=60) if is_starting else since,
        NOW - timedelta(seconds=5),
        0 if is_starting else gpu.vram_gb - 1,
        chance.choice(CLOUDS),
        f"pod-{number}",
        gpu.secure_usd,
        job=None if is_idle or is_starting else demand(-number, chance),
        run_started_at=None if is_idle or is_starting else since,
        idle_since=since if is_idle else None,
    )


def milliseconds(max_workers: int, rounds: int) -> list[tuple[float, float]]:
    """What each of several passes took, of wall time and of CPU time."""
    chance = random.Random(0)
    jobs = [demand(number, chance) for number in range(JOBS)]
    workers = [worker(number, chance) for number in range(WORKERS)]
    pods = [Pod(w.pod_id or "", pod_name(w.id), "RUNNING") for w in workers]
    taken: list[tuple[float, float]] = []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        actions = plan(jobs, workers, pods, Limits(max_workers), Market(), NOW)
        taken.append((1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu)))
        assert actions
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, bar {BAR_MS:.0f} ms")
    worst = 0.0
    for name, max_workers in (("100 slots free", WORKERS + 100), ("at the limit", WORKERS)):
        wall, cpu = zip(*milliseconds(max_workers, options.rounds), strict=True)
        median = statistics.median(wall)
        worst = max(worst, median)
        print(
            f"{name}: median {median:.1f} ms, best {min(wall):.1f} ms, worst {max(wall):.1f} ms; "
            f"of CPU time median {statistics.median(cpu):.1f} ms"
        )
    return 0 if worst <= BAR_MS else 1


if __name__ == "__main__":
    sys.exit(main())
