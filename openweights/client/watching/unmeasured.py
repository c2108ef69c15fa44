"""What some of several jobs have not measured while others have: why, and which parameter asks for
it. Tables, figures and the page say it, instead of leaving a line or a cell out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from openweights.client.watching.meaning import plain_name
from openweights.client.watching.panels import measure_rank
from openweights.types import ENDED, JobRecord

# What is measured only where a parameter asks for it, or another one in its place.
_ASKED_BY = (
    (re.compile(r"kl_to_base(\[.*)?", re.DOTALL), ("kl_to_base_steps",)),
    (re.compile(r"multiple_choice/.*", re.DOTALL), ("mcq_callbacks",)),
    (re.compile(r"(logprobs|logprob_block)/.*", re.DOTALL), ("logp_callback_datasets",)),
    (re.compile(r"eval_.*", re.DOTALL), ("test_file", "holdout_fraction")),
)
_MOST_NAMED = 3  # jobs of a line


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A measure, or several, that jobs lack.

    Attributes:
        jobs: Their ids.
        parameter: That asks for it; None where none does.
        why: Goes on behind the jobs' names.
    """

    measure: str
    jobs: tuple[str, ...]
    parameter: str | None
    why: str

    def words(self, called: Mapping[str, str] | None = None) -> str:
        """All of it in a line.

        Args:
            called: What jobs are called, by their ids; default: these.
        """
        names = list(dict.fromkeys((called or {}).get(job, job) for job in self.jobs))
        more = len(names) - _MOST_NAMED
        who = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{self.measure}: not measured in {who}{self.why}"


def unmeasured(
    jobs: Sequence[JobRecord],
    measured: Sequence[Collection[str]],
    names: Iterable[str] | None = None,
) -> list[Unmeasured]:
    """Of each of these measures the trainings that lack it, by the reason why; what matters most
    comes first.

    Args:
        measured: Of each job its measures, as `series_name` calls them, or a comparison.
        names: Which measures; default: all that any of the jobs has.
    """
    names = (name for own in measured for name in own) if names is None else names
    found: list[Unmeasured] = []
    for name in sorted(dict.fromkeys(map(plain_name, names)), key=measure_rank):
        having = [any(plain_name(own) == name for own in of) for of in measured]
        if not any(having):
            continue
        losses = {_loss(job) for job, has in zip(jobs, having, strict=True) if has}
        reasons: dict[tuple[str | None, str], list[str]] = {}
        for job, has in zip(jobs, having, strict=True):
            if not has and job.type == "fine-tuning":
                reasons.setdefault(_reason(job, name, losses), []).append(job.id)
        found += [Unmeasured(name, tuple(own), *reason) for reason, own in reasons.items()]
    return found


def merged(found: Iterable[Unmeasured]) -> list[Unmeasured]:
    """Those that the same jobs lack for the same reason as one, with all their names."""
    names: dict[Unmeasured, list[str]] = {}
    for one in found:
        names.setdefault(replace(one, measure=""), []).append(one.measure)
    return [replace(one, measure=", ".join(own)) for one, own in names.items()]


def asked_for_elsewhere(every: Iterable[Unmeasured]) -> list[Unmeasured]:
    """Of these what a parameter would have asked for: a line for each parameter and the jobs that
    lack it, with its first measure.
    """
    lines: dict[tuple[str, tuple[str, ...]], Unmeasured] = {}
    for one in every:
        if one.parameter is not None:
            lines.setdefault((one.parameter, one.jobs), one)
    return [*lines.values()]


def _reason(job: JobRecord, name: str, losses: Collection[str]) -> tuple[str | None, str]:
    params = job.validated_params
    fields = next((own for pattern, own in _ASKED_BY if pattern.fullmatch(name)), ())
    is_asked = any(params.get(field) for field in fields)
    if fields and not is_asked:
        return fields[0], f"; {fields[0]} asks for it"
    if not is_asked and losses and _loss(job) not in losses:
        return None, f"; it is of {', '.join(sorted(losses))}"
    return None, ", which has ended" if job.status in ENDED else " yet"


def _loss(job: JobRecord) -> str:
    return str(job.validated_params.get("loss"))
