"""What evaluations have found: in a word for tables, and all of it for their own pages and those
of jobs whose models they asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from openweights.backends.base import Backend
from openweights.client.event_json import as_number
from openweights.events import MMLU_PRO, Evaluation
from openweights.number_words import number_words
from openweights.types import ENDED, EventRecord, JobRecord

_EVALUATIONS = ("evaljob-", "mmlujob-")
_ACCURACY = "accuracy"


def scores(
    backend: Backend, jobs: Iterable[JobRecord], about: Collection[str]
) -> list[dict[str, Any]]:
    """What evaluations among the jobs have scored, the oldest evaluation first.

    Each is `{evaluation, model, job, task, score, low, high, problems, difference}`; `job` is the
    fine-tuning job that the model is of.

    Args:
        about: Ids of jobs: of an evaluation all its scores, of another job those of its model.
    """
    found: list[dict[str, Any]] = []
    for job in sorted(filter(_is_evaluation, jobs), key=lambda job: job.updated_at):
        if job.id in about or any(_job_of(model) in about for model in models_of(job)):
            found += _scores_of(backend, job, about)
    return found


def best_scores(backend: Backend, job: JobRecord) -> dict[str, float]:
    """Of each task the score, of several models the best; of MMLU-Pro that of all subjects, and
    `accuracy` of questions with choices. Empty for a job that has not ended, or scored nothing.
    """
    if job.status not in ENDED or job.attempts == 0:
        return {}
    if not _is_evaluation(job):
        accuracy = as_number((job.outputs or {}).get(_ACCURACY))
        return {} if accuracy is None else {_ACCURACY: accuracy}
    best: dict[str, float] = {}
    for one in _scores_of(backend, job, (job.id,)):
        best[one["task"]] = max(one["score"], best.get(one["task"], one["score"]))
    return {MMLU_PRO: best[MMLU_PRO]} if MMLU_PRO in best else best


def score_words(best: Mapping[str, float], job: JobRecord) -> str:
    """`best_scores` of the job, as in `gsm8k 0.41 · tool_use 0.8, best of 2`; empty for none."""
    words = " · ".join(f"{task} {number_words(score, 4)}" for task, score in best.items())
    models = len(models_of(job))
    return f"{words}, best of {models}" if words and models > 1 else words


def _is_evaluation(job: JobRecord) -> bool:
    return job.attempts > 0 and job.id.startswith(_EVALUATIONS)


def models_of(job: JobRecord) -> list[str]:
    """Those that a job asks, or its one model."""
    params = job.validated_params
    models: object = params.get("models")
    asked = cast("list[object]", models) if isinstance(models, list) else []
    return [str(model) for model in asked] or ([job.model] if job.model else [])


def _job_of(model: str) -> str:
    """The job of a model that is a job's, or its checkpoint's."""
    return model.partition("/")[0]


def _scores_of(backend: Backend, job: JobRecord, about: Collection[str]) -> list[dict[str, Any]]:
    runs = backend.list_runs(job_id=job.id, limit=1)
    logged = backend.list_events(run_id=runs[-1].id, type=Evaluation.type)
    return [
        {
            "evaluation": job.id,
            "model": event.model,
            "job": _job_of(event.model),
            "task": event.task,
            "score": event.score,
            "low": event.low,
            "high": event.high,
            "problems": event.problems,
            "difference": event.difference,
        }
        for event in filter(None, map(_evaluation, logged))
        if job.id in about or _job_of(event.model) in about
    ]


def _evaluation(event: EventRecord) -> Evaluation | None:
    """None for what only calls itself one: a job's own code may log what it likes."""
    data = event.data
    numbers = (data.get(name) for name in ("score", "low", "high", "problems"))
    texts = (data.get(name) for name in ("model", "task"))
    of_words = all(isinstance(text, str) for text in texts)
    if not of_words or not all(isinstance(number, int | float) for number in numbers):
        return None
    return Evaluation.of(data)
