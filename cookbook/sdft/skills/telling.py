"""What the study says: how many runs it is, what is at work, and what it lacks at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from cookbook.sdft.skills.results import LABELS, Run, exact, measured

SILENT_S = 60.0  # between two lines on what is at work
_MOST_NAMED = 6  # runs of a line

Doing = tuple[Run, str]  # a run that has not ended, and what is done for it; empty if nothing is


def planned(first: int, total: int) -> str:
    """How many runs there are, before any has begun."""
    later = total - first
    then = f": {first} now, and {_runs(later)} of the later skills at the rates that did best"
    return _runs(total) + (then if later else "")


def chosen(rates: Mapping[str, float], later: int) -> str:
    """At which rates the later skills are taught."""
    own = ", ".join(f"{LABELS[method]} at {exact(rate)}" for method, rate in rates.items())
    return f"the later skills are taught by {_runs(later)}; best were {own or 'none'}"


def told(run: Run) -> str:
    """A run that has ended, in a line."""
    if run.stopped:
        return f"{run.label}: {' '.join(filter(None, (run.job_id, run.stopped)))}"
    scores = [f"{name} {run.score(name):.2f}" for name in (*run.scores, *run.kept)]
    return f"{run.label}: {', '.join(scores)}, KL to base {run.kl:.3f}"


def at_work(waiting: Sequence[Doing]) -> str:
    """What is done now for the runs that have not ended."""
    busy = [f"{run.label}: {doing}" for run, doing in waiting if doing]
    idle = len(waiting) - len(busy)
    waits = f"{_runs(idle)} {'waits' if idle == 1 else 'wait'}" if idle else ""
    return "; ".join(filter(None, (*busy, waits)))


def lacking(total: int, ended: Sequence[Run], waiting: Sequence[Doing] = ()) -> str:
    """What figures and tables of these runs lack, in a line; empty where nothing is missing.

    Args:
        ended: Those that completed and those that did not.
    """
    complete = measured(ended)
    if len(complete) >= total:
        return ""
    parts = [f"{run.label} ({doing or 'not begun'})" for run, doing in waiting[:_MOST_NAMED]]
    if (unnamed := total - len(ended) - len(parts)) > 0:
        parts.append(f"{unnamed} more" if parts else f"{_runs(unnamed)} not begun")
    parts += [f"{run.label} (stopped)" for run in ended if run.stopped]
    goes_on = "" if len(ended) >= total else "; the same command goes on"
    return f"{len(complete)} of {_runs(total)}; missing: {'; '.join(parts)}{goes_on}"


def at_most_every(
    seconds: float, act: Callable[[], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """What calls `act` once so long has passed, and again after as long."""
    due_at = clock() + seconds

    def call() -> None:
        nonlocal due_at
        if clock() >= due_at:
            act()
            due_at = clock() + seconds

    return call


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
