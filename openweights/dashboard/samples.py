"""What the model said along the way: answers by step, and log-probabilities of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO, cast

from openweights.backends.base import Backend
from openweights.errors import NotFoundError
from openweights.events import BlockwiseLogProbs, Completions, LogProbs, Samples, TeacherGate
from openweights.models.templates.messages import flat_text
from openweights.types import EventRecord

# A page shows so many rows of a file of samples.
MOST_ROWS = 200


def answer_steps(backend: Backend, job_id: str) -> list[dict[str, Any]]:
    """Where answers were logged: `{event, step, source}`, by source and step."""
    found = [
        (event, "training prompts" if kind is Completions else event.data.get("tag") or "samples")
        for kind in (Completions, Samples)
        for event in backend.list_events(job_id=job_id, type=kind.type)
    ]
    steps = [
        {"event": event.id, "step": step_of(event), "source": str(source)}
        for event, source in found
    ]
    return sorted(steps, key=lambda one: (one["source"], one["step"], one["event"]))


def answer_rows(backend: Backend, job_id: str, event_id: int) -> list[dict[str, Any]]:
    """Rows of such an event: `{prompt, messages, completion, rewards?, ended?, reference?}`.

    `messages` are what was asked, each `{role, text}`; `prompt` is all of it as one text. Of a
    completion that was logged with its rendered prompt alone that is the only message.

    Raises:
        NotFoundError: The job has no such event.
    """
    event = _event(backend, job_id, event_id)
    if event.data.get("type") == Completions.type:
        rows = list(islice(_mappings(event.data.get("completions")), MOST_ROWS))
    else:
        rows = rows_of(backend, event)
    return [_answer(row) for row in rows]


def gates(backend: Backend, job_id: str) -> list[dict[str, Any]]:
    """What the demonstrations did for SDFT's teacher, with examples, each time it was looked at."""
    return [dict(e.data) for e in backend.list_events(job_id=job_id, type=TeacherGate.type)]


def token_steps(backend: Backend, job_id: str) -> list[dict[str, Any]]:
    """Where log-probabilities of tokens were logged: `{event, step, tag}`, oldest first."""
    found: list[EventRecord] = []
    for kind in (LogProbs, BlockwiseLogProbs):
        found += backend.list_events(job_id=job_id, type=kind.type)
    return [
        {
            "event": event.id,
            "step": step_of(event),
            "tag": str(event.data.get("tag") or "dataset"),
        }
        for event in sorted(found, key=lambda event: event.id)
    ]


def token_rows(backend: Backend, job_id: str, event_id: int) -> list[list[dict[str, Any]]]:
    """Rows of such an event, each a list of `{text, logprob, answer}`, one for each token; where a
    block begins, `{block: {tag?, weight?}}` stands before its tokens.

    Raises:
        NotFoundError: The job has no such event.
    """
    return [_pieces(row) for row in rows_of(backend, _event(backend, job_id, event_id))]


def step_of(event: EventRecord) -> int:
    """0 for what a job of somebody's own has logged without a whole number."""
    step = event.data.get("step")
    return step if isinstance(step, int) else 0


def _event(backend: Backend, job_id: str, event_id: int) -> EventRecord:
    event = next(iter(backend.list_events(job_id=job_id, after=event_id - 1)), None)
    if event is None or event.id != event_id:
        raise NotFoundError(f"job {job_id} has no event {event_id}")
    return event


def rows_of(backend: Backend, event: EventRecord) -> list[dict[str, Any]]:
    """The first rows of the file that an event names; none when it is no longer there."""
    file = event.data.get("file")
    if not isinstance(file, str):
        return []
    try:
        with backend.open_file(file) as content:
            return list(islice(objects(content), MOST_ROWS))
    except NotFoundError:
        return []


def objects(content: BinaryIO) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects: a job of somebody's own may have written the file."""
    for line in content:
        with suppress(ValueError):
            yield from _mappings([json.loads(line)])


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _mappings(rows: object) -> Iterator[dict[str, Any]]:
    for row in _list(rows):
        if isinstance(row, dict):
            yield cast("dict[str, Any]", row)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"ended": row["ended"]} if "ended" in row else {}
    if isinstance(row.get("rewards"), Mapping):
        kept["rewards"] = row["rewards"]
    prompt = row.get("prompt")
    told = row.get("messages") if isinstance(prompt, str) else prompt or row.get("messages")
    messages, reference = asked(_list(told))
    if not messages:
        messages = [{"role": "prompt", "text": str(prompt)}]
    return {
        "prompt": _as_text(messages),
        "messages": messages,
        "completion": str(row.get("completion", "")),
        **({"reference": reference} if reference else {}),
        **kept,
    }


def asked(conversation: Sequence[object]) -> tuple[list[dict[str, str]], str | None]:
    """The messages up to the answer, each `{role, text}`, and the answer that the row has."""
    messages, reference = [*_mappings(conversation)], None
    if messages and messages[-1].get("role") == "assistant":
        reference = flat_text(messages[-1].get("content"))
        messages = messages[:-1]
    told = [{"role": str(m.get("role")), "text": flat_text(m.get("content"))} for m in messages]
    return told, reference


def _as_text(messages: list[dict[str, str]]) -> str:
    """By which prompts of several steps and jobs are told to be the same."""
    if len(messages) == 1:
        return messages[0]["text"]
    return "\n".join(f"{message['role']}: {message['text']}" for message in messages)


def _pieces(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens of a row of either format of log-probability files."""
    if "tokens" in row:
        tokens, values = _list(row["tokens"]), _list(row.get("logprobs"))
        answer = _list(row.get("is_answer")) or [True] * len(tokens)
        columns = zip(tokens, values, answer, strict=False)
        return [_piece(token, value, wanted) for token, value, wanted in columns]
    pieces: list[dict[str, Any]] = []
    for message in _mappings(row.get("messages")):
        content = message.get("content")
        pieces.append(_piece(f"[{message.get('role')}] ", None, False))
        if not isinstance(content, list):
            pieces.append(_piece(flat_text(content), None, False))
            continue
        for block in _mappings(cast("object", content)):
            about = {key: block[key] for key in ("tag", "weight") if block.get(key) is not None}
            pairs = zip(_list(block.get("tokens")), _list(block.get("logprobs")), strict=False)
            pieces += [{"block": about}, *(_piece(token, value, True) for token, value in pairs)]
    return pieces


def _piece(text: object, logprob: object, answer: object) -> dict[str, Any]:
    value = logprob if isinstance(logprob, int | float) else None
    return {"text": str(text), "logprob": value, "answer": bool(answer)}
