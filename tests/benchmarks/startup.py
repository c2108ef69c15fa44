"""CPU time of `import openweights` and `ow --help`, interpreter start included.

Run it with `python -m tests.benchmarks.startup [runs]`; it exits with 1 when a bound is missed.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BOUNDS_S = {"import openweights": 0.100, "ow --help": 0.150}
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import openweights": ["-c", "import openweights"],
    "import OpenWeights": ["-c", "from openweights import OpenWeights"],
    "ow --help": ["-m", "openweights.cli", "--help"],
}


def cpu_seconds(arguments: list[str], runs: int) -> list[float]:
    """User and system time of each run of Python with these arguments; caches are warm."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    spent: list[float] = []
    for _ in range(runs + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], env=env, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return spent[1:]


def main() -> int:
    """Print a line for each command."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    missed = False
    for name, arguments in COMMANDS.items():
        spent = cpu_seconds(arguments, runs)
        median = statistics.median(spent)
        bound = BOUNDS_S.get(name)
        missed = missed or (bound is not None and median > bound)
        limit = "" if bound is None else f" (bound {1000 * bound:.0f} ms)"
        print(
            f"{name:<20} median {1000 * median:5.1f} ms, least {1000 * min(spent):5.1f} ms{limit}"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
