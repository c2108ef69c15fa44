"""How long a judge may take; apart from the judges, which need openai."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JudgeLimits:
    """How long a judge may take.

    Attributes:
        call_s: One call.
        total_s: All calls of a step with their retries; below the lease of 60 s.
        attempts: Calls for one completion.
        first_wait_s: Before the second call, when the server does not say how long; doubles.
        concurrency: Calls at a time.
    """

    call_s: float = 30.0
    total_s: float = 50.0
    attempts: int = 6
    first_wait_s: float = 0.5
    concurrency: int = 32
