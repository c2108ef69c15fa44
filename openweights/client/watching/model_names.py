"""Models that are jobs' under names for people: an id tells nobody what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from openweights.client.watching.differences import differing, labels_by, parameters, telling_apart
from openweights.errors import NotFoundError
from openweights.models.names import CHECKPOINT, TRAINING_JOB, short_name
from openweights.types import JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_MOST = 30  # characters of what tells two jobs apart


def model_names(backend: Backend, models: Iterable[str]) -> dict[str, str]:
    """Of each of these models that is a job's what it is, as far as the store has the job:
    `SmolLM2-135M-Instruct after sft`, or `… after step 20 of sft` of a checkpoint. Those that
    would be called the same are told apart by their jobs' parameters, else by the jobs' ids.
    """
    lines = {model: [*_line(backend, model)] for model in dict.fromkeys(models)}
    found = {model: line for model, line in lines.items() if line}
    words = {model: _words(model, line) for model, line in found.items()}
    alike: dict[str, dict[str, JobRecord]] = {}
    for model, line in found.items():
        alike.setdefault(words[model], {})[model] = line[0]
    for jobs in alike.values():
        if len(jobs) > 1:
            words |= {model: f"{words[model]} ({part})" for model, part in _apart(jobs).items()}
    return words


def _line(backend: Backend, model: str | None) -> Iterator[JobRecord]:
    """The job that a model is of, the one that it has gone on from, and so on."""
    while model and TRAINING_JOB.fullmatch(head := model.partition("/")[0]):
        try:
            job = backend.get_job(head)
        except NotFoundError:
            return
        yield job
        model = job.model


def _words(model: str, line: Iterable[JobRecord]) -> str:
    """The first model, and what was done to it, in order."""
    trained: list[str] = []
    for job in line:
        part = model.partition("/")[2]
        loss = str(job.validated_params.get("loss") or "training")
        is_part = part.startswith(CHECKPOINT)
        trained.append(f"step {part.removeprefix(CHECKPOINT)} of {loss}" if is_part else loss)
        model = job.model or "a model"
    return f"{short_name(model)} after {', '.join(reversed(trained))}"


def _apart(jobs: Mapping[str, JobRecord]) -> dict[str, str]:
    given = [parameters(job) for job in jobs.values()]
    names = [name for name in differing(given) if name != "model"]
    told = labels_by(given, telling_apart(given, names))
    is_told = len({*told}) == len(told) and all(0 < len(text) <= _MOST for text in told)
    ids = [job.id for job in jobs.values()]
    return dict(zip(jobs, told if is_told else ids, strict=True))
