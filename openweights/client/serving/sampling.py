"""`job.sample`: what a fine-tuned model answers, beside the model that it was trained from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from openweights.errors import InvalidInputError, InvalidStateError

if TYPE_CHECKING:
    from openweights.client import OpenWeights
    from openweights.client.jobs import Job

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
    if isinstance(prompts, str) or not prompts:
        raise InvalidInputError("prompts: give a list of questions, or of conversations")
    if job.model is None:
        raise InvalidStateError(f"job {job.id} has no model to ask; give a fine-tuning job")
    lines = "".join(json.dumps({"messages": _messages(prompt)}) + "\n" for prompt in prompts)
    file = ow.files.create(lines.encode(), "conversations")["id"]
    trained = ow.inference.newest(job.id)
    models = [job.model, trained] if base else [trained]
    jobs = [ow.inference.create(model=m, input_file_id=file, **params) for m in models]
    answers = [_completions(ow, asked) for asked in jobs]
    before = answers[0] if base else [None] * len(prompts)
    return [
        {"prompt": prompt, "base": old, "answer": new}
        for prompt, old, new in zip(prompts, before, answers[-1], strict=True)
    ]


def _messages(prompt: Prompt) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _completions(ow: OpenWeights, job: Job) -> list[Any]:
    job.wait()
    assert job.outputs is not None
    content = ow.files.content(str(job.outputs["file"]))
    return [json.loads(line)["completion"] for line in content.splitlines()]
