"""When a pending job may be taken, and what becomes of it when that can never be: decisions without
I/O, for the store on this machine and for whoever tells users why a job waits.

A project decides the same in SQL (`supabase/sql/code/032_scheduling.sql`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from openweights.errors import InvalidInputError, InvalidStateError, shown
from openweights.retry import backoff_s
from openweights.types import Retry

LONGEST_BACKOFF_S = 86_400.0
CAUSES = ("any", "oom", "hub", "exit:N")


def cycle_through(
    job_id: str, after: Iterable[str], needs: Callable[[str], Iterable[str]]
) -> list[str] | None:
    """The ids from `job_id` back to itself, if it waited for `after`; None without a cycle.

    Args:
        needs: What another job waits for.
    """
    came_from = dict.fromkeys(after, job_id)
    waiting = list(came_from)
    while waiting:
        current = waiting.pop()
        if current == job_id:
            return _path_to(job_id, came_from)
        for needed in needs(current):
            if needed not in came_from:
                came_from[needed] = current
                waiting.append(needed)
    return None


def _path_to(job_id: str, came_from: dict[str, str]) -> list[str]:
    path = [job_id, came_from[job_id]]
    while path[-1] != job_id:
        path.append(came_from[path[-1]])
    return path[::-1]


def check_after(
    job_id: str,
    after: Sequence[str],
    status_of: Callable[[str], str | None],
    needs: Callable[[str], Iterable[str]],
) -> None:
    """See that a job can wait for these.

    Args:
        status_of: Of a job; None for one that does not exist.
        needs: What another job waits for.

    Raises:
        InvalidInputError: One does not exist, or waits for this one.
        InvalidStateError: One has failed or was canceled.
    """
    for needed in after:
        if needed != job_id and status_of(needed) is None:
            raise InvalidInputError(f"after: there is no job {shown(needed)}; correct the id")
    if (path := cycle_through(job_id, after, needs)) is not None:
        raise InvalidInputError(cycle_refused(path))
    check_none_failed(after, status_of)


def check_none_failed(after: Iterable[str], status_of: Callable[[str], str | None]) -> None:
    """See that nothing keeps a job from waiting for these, as it did before.

    Raises:
        InvalidStateError: One has failed or was canceled.
    """
    if (ended := ended_badly(after, status_of)) is not None:
        raise InvalidStateError(
            f"after: job {ended[0]} is {ended[1]}: restart it first, with `ow restart {ended[0]}`"
        )


def ended_badly(
    after: Iterable[str], status_of: Callable[[str], str | None]
) -> tuple[str, str] | None:
    """The first of them that has failed or was canceled, and which."""
    for needed in after:
        status = status_of(needed)
        if status in ("failed", "canceled"):
            return needed, status
    return None


def cycle_refused(path: Sequence[str]) -> str:
    """Why a job cannot wait for jobs that wait for it."""
    return f"after: these jobs would wait for one another: {' waits for '.join(path)}"


def reason_of_dependent(job_id: str, status: str) -> str:
    """Why a job has failed that was to come after `job_id`, which ended with `status`."""
    what = "was canceled" if status == "canceled" else "has failed"
    return f"it was to come after job {job_id}, which {what}; it is restarted with that one"


def pause_before_retry(
    retry: Retry | None, retries: int, cause: str | None, exit_code: int | None
) -> float | None:
    """Seconds until a job may be tried again after a failure; None when it has failed for good.

    Args:
        retries: Failures that were retried before this one.
        exit_code: Negative for a signal, which counts as a shell says it: 128 and its number.
    """
    if retry is None or retries >= retry.max:
        return None
    if not (_causes(cause, exit_code) & set(retry.on)):
        return None
    return backoff_s(retries, retry.backoff_s, LONGEST_BACKOFF_S)


def _causes(cause: str | None, exit_code: int | None) -> set[str]:
    """What `Retry.on` may call a failure; one that the job did not end by itself has no name."""
    found = set[str]() if cause is None else {cause}
    if exit_code is not None:
        found |= {"any", f"exit:{128 - exit_code if exit_code < 0 else exit_code}"}
    return found
