"""What differs between jobs, and the fewest parameters that tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from openweights.client.secrets import without_keys
from openweights.client.watching.field_order import in_order
from openweights.number_words import number_words, value_words
from openweights.types import JobRecord

Params = dict[str, Any]

# Names of a job and of its result: they differ whenever anything does.
_NAMES = frozenset({"finetuned_model_id", "job_id_suffix"})
_DIGITS = 6  # of a number in a legend
_SHORT = 24  # characters: as numbers and names, not files and templates


def parameters(job: JobRecord) -> Params:
    """The job's parameters by dotted names, such as `meta.rate`."""
    return dict(flat(without_keys(job).validated_params, ""))


def flat(value: Mapping[str, Any], at: str) -> Iterable[tuple[str, Any]]:
    """Each value by its dotted name below `at`."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flat(cast("Mapping[str, Any]", item), f"{at}{key}.")
        else:
            yield f"{at}{key}", item


def differing(jobs: Sequence[Params]) -> list[str]:
    """The parameters that are not the same in all of them."""
    names = dict.fromkeys(name for job in jobs for name in job if name not in _NAMES)
    return [name for name in in_order(names) if len({repr(job.get(name)) for job in jobs}) > 1]


def labels_by(jobs: Sequence[Params], names: Sequence[str]) -> list[str]:
    """What each job is called by the values of these parameters."""
    return [", ".join(f"{name}={_told(params.get(name))}" for name in names) for params in jobs]


def _told(value: object) -> str:
    """As short as a legend has it."""
    return number_words(value, _DIGITS) if isinstance(value, float) else value_words(value)


def telling_apart(jobs: Sequence[Params], names: Sequence[str]) -> list[str]:
    """The fewest of these parameters by which the jobs are told apart as well as by all of them;
    of equally good ones the one that is short to say, and comes first.
    """
    names = sorted(names, key=lambda name: _is_long(jobs, name))
    kept: list[str] = []
    while len(kept) < len(names) and _groups(jobs, kept) < _groups(jobs, names):
        kept.append(max(names, key=lambda name: _groups(jobs, [*kept, name])))
    return kept


def _is_long(jobs: Sequence[Params], name: str) -> bool:
    return any(len(str(params.get(name))) > _SHORT for params in jobs)


def _groups(jobs: Sequence[Params], names: Sequence[str]) -> int:
    return len({tuple(repr(params.get(name)) for name in names) for params in jobs})
