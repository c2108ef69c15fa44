"""`job.sample`: what a fine-tuned model answers, beside the model that it was trained from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict, cast

from openweights.backends.values import LEAST_KEEP_S
from openweights.errors import InvalidInputError, InvalidStateError
from openweights.types import QUESTION_PRIORITY, JobRecord

if TYPE_CHECKING:
    from openweights.backends.base import Backend
    from openweights.client import OpenWeights
    from openweights.client.jobs import Job

# The jobs that `job.sample` makes for itself bear this label, and their ids this suffix. Lists
# leave them out, and what is older than other garbage goes with it.
LABEL = "job.sample"
# A person looks at these answers, and a CPU may write ten tokens a second.
_MAX_TOKENS = 256
# For the answers to so many prompts a person waits; more are work like any other.
_MOST_AWAITED = 100
PROMPTS = "prompts of job.sample.jsonl"  # a true name, among the datasets of people
_SUFFIX = "sample"  # the same inference, asked for by its own name, is another job

# A question, or a conversation.
Prompt = str | Sequence[Mapping[str, Any]]


class Sample(TypedDict):
    """Answers to a prompt.

    Attributes:
        prompt: As it was given.
        base: What the model said before the training; None when it was not asked.
        answer: What the job's model says.
    """

    prompt: Prompt
    base: str | None
    answer: str


def sample(
    ow: OpenWeights, job: Job, prompts: Sequence[Prompt], *, base: bool, params: Mapping[str, Any]
) -> list[Sample]:
    """See `Job.sample`."""
    if not _are_prompts(prompts):
        raise InvalidInputError("prompts: give a list of questions, or of conversations")
    if job.model is None:
        raise InvalidStateError(f"job {job.id} has no model to ask; give a fine-tuning job")
    _check_params(ow, job.model, params)
    trained = ow.inference.newest(job.id)
    models = [trained, job.model] if base else [trained]
    answers = _completions(ow, submit(ow, models, prompts, params))
    after = answers[: len(prompts)]
    before = answers[len(prompts) :] if base else [None] * len(prompts)
    return [
        {"prompt": prompt, "base": old, "answer": new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def _check_params(ow: OpenWeights, model: str, params: Mapping[str, Any]) -> None:
    """See that the parameters are right, whatever the job has saved.

    Raises:
        ConfigError: A line for each that is wrong.
    """
    own = ow.inference.own_params(params)
    ow.inference.checked(
        {"model": model, "input_file_id": "conversations:", "max_tokens": _MAX_TOKENS, **own}
    )


def submit(
    ow: OpenWeights, models: Sequence[str], prompts: Sequence[Prompt], params: Mapping[str, Any]
) -> Job:
    """One job that asks them all, so that what they have in common is loaded once."""
    lines = "".join(json.dumps({"messages": _messages(prompt)}) + "\n" for prompt in prompts)
    file = ow.files.create(lines.encode(), "conversations", name=PROMPTS)["id"]
    given: dict[str, Any] = {
        "label": LABEL,
        "job_id_suffix": _SUFFIX,
        "input_file_id": file,
        "priority": priority_of(len(prompts)),
        "max_tokens": _MAX_TOKENS,
        **params,
    }
    model, *others = models
    return ow.inference.create(model=model, other_models=others, **given)


def priority_of(prompts: int) -> int:
    """Of an inference that somebody waits for."""
    return QUESTION_PRIORITY if prompts <= _MOST_AWAITED else 0


def is_of_sample(job: JobRecord) -> bool:
    """Whether `job.sample` made the job for itself: a label alone may be anybody's."""
    return job.type == "inference" and job.label == LABEL and job.id.endswith(f"-{_SUFFIX}")


def old_samples(backend: Backend, keep_s: float) -> list[JobRecord]:
    """Jobs of `job.sample` that ended so long ago."""
    before = backend.now() - timedelta(seconds=max(keep_s, LEAST_KEEP_S))
    ended = backend.list_jobs(statuses=("completed", "failed", "canceled"), limit=None)
    return [job for job in ended if is_of_sample(job) and job.updated_at < before]


def _are_prompts(prompts: object) -> bool:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return False
    items = cast("Sequence[object]", prompts)
    return bool(items) and all(isinstance(item, str | list | tuple) for item in items)


def _messages(prompt: Prompt) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _completions(ow: OpenWeights, job: Job) -> list[Any]:
    job.wait()
    assert job.outputs is not None
    content = ow.files.content(str(job.outputs["file"]))
    return [json.loads(line)["completion"] for line in content.splitlines()]
