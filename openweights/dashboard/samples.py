"""What the model said along the way: answers by step, and log-probabilities of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, cast

from openweights.backends.base import Backend
from openweights.errors import NotFoundError
from openweights.events import (
    BlockLogProbs,
    BlockwiseLogProbs,
    Completions,
    LogProbs,
    Samples,
    TeacherGate,
)
from openweights.types import EventRecord

# A page shows so many rows of a file of samples.
MOST_ROWS = 200


def answers(backend: Backend, job_id: str) -> list[dict[str, Any]]:
    """What the job's model answered, a group for each event: `{step, source, rows}`, by step.

    Each row is `{prompt, completion, rewards?, ended?, reference?}`.
    """
    groups: list[dict[str, Any]] = []
    for event in backend.list_events(job_id=job_id, type=Completions.type):
        rows = cast("Sequence[Mapping[str, Any]]", event.data.get("completions") or ())
        groups.append(_group(event, "training prompts", [_answer(row) for row in rows]))
    for event in backend.list_events(job_id=job_id, type=Samples.type):
        rows = [_answer(row) for row in rows_of(backend, event)]
        groups.append(_group(event, str(event.data.get("tag") or "samples"), rows))
    return sorted(groups, key=lambda group: (group["source"], group["step"]))


def gate(backend: Backend, job_id: str) -> dict[str, Any] | None:
    """The last look at what the demonstrations do for SDFT's teacher, with its examples."""
    events = list(backend.list_events(job_id=job_id, type=TeacherGate.type))
    return dict(events[-1].data) if events else None


def token_steps(backend: Backend, job_id: str) -> list[dict[str, Any]]:
    """Where log-probabilities of tokens were logged: `{event, step, tag}`, oldest first."""
    found: list[EventRecord] = []
    for kind in (LogProbs, BlockwiseLogProbs, BlockLogProbs):
        found += backend.list_events(job_id=job_id, type=kind.type)
    return [
        {
            "event": event.id,
            "step": event.data.get("step", 0),
            "tag": str(event.data.get("tag") or event.data.get("source") or "dataset"),
        }
        for event in sorted(found, key=lambda event: event.id)
    ]


def token_rows(backend: Backend, job_id: str, event_id: int) -> list[dict[str, Any]]:
    """Rows of such an event: `{pieces: [{text, logprob, answer}]}`, a piece for each token.

    Raises:
        NotFoundError: The job has no such event, or its file is gone.
    """
    event = next(iter(backend.list_events(job_id=job_id, after=event_id - 1)), None)
    if event is None or event.id != event_id:
        raise NotFoundError(f"job {job_id} has no event {event_id}")
    if event.data.get("type") == BlockLogProbs.type:
        block = BlockLogProbs.of(event.data)
        return [{"title": block.tag, "pieces": [_piece(block.text, _mean(block.logprobs), True)]}]
    return [{"title": "", "pieces": _pieces(row)} for row in rows_of(backend, event)]


def rows_of(backend: Backend, event: EventRecord) -> list[dict[str, Any]]:
    """The first rows of the file that an event names; none when it is no longer there."""
    file = event.data.get("file")
    if not isinstance(file, str):
        return []
    try:
        with backend.open_file(file) as content:
            return list(islice(_objects(content), MOST_ROWS))
    except NotFoundError:
        return []


def _objects(content: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in content:
        if line.strip():
            row: object = json.loads(line)
            if isinstance(row, dict):
                yield cast("dict[str, Any]", row)


def _group(event: EventRecord, source: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"step": event.data.get("step", 0), "source": source, "rows": rows[:MOST_ROWS]}


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("rewards", "ended") if key in row}
    prompt, reference = row.get("prompt"), None
    if prompt is None:
        prompt, reference = _asked(cast("list[dict[str, Any]]", row.get("messages") or []))
    return {
        "prompt": str(prompt),
        "completion": str(row.get("completion", "")),
        **({"reference": reference} if reference else {}),
        **kept,
    }


def _asked(messages: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The conversation up to the answer as one text, and the answer that the row itself has."""
    reference = None
    if messages and messages[-1].get("role") == "assistant":
        reference = content_text(messages[-1].get("content"))
        messages = messages[:-1]
    if len(messages) == 1:
        return content_text(messages[0].get("content")), reference
    said = [f"{m.get('role')}: {content_text(m.get('content'))}" for m in messages]
    return "\n".join(said), reference


def content_text(content: object) -> str:
    """A message's content as text, whether it is one or a list of blocks."""
    if isinstance(content, list):
        blocks = cast("list[object]", content)
        return "".join(
            str(cast("dict[str, Any]", block).get("text", ""))
            for block in blocks
            if isinstance(block, dict)
        )
    return "" if content is None else str(content)


def _pieces(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens of a row of either format of log-probability files."""
    if "tokens" in row:
        answer = row.get("is_answer") or [True] * len(row["tokens"])
        columns = zip(row["tokens"], row["logprobs"], answer, strict=False)
        return [_piece(token, value, wanted) for token, value, wanted in columns]
    pieces: list[dict[str, Any]] = []
    for message in cast("list[dict[str, Any]]", row.get("messages") or []):
        content = message.get("content")
        blocks = cast("list[dict[str, Any]]", content if isinstance(content, list) else [])
        pieces.append(_piece(f"[{message.get('role')}] ", None, False))
        if isinstance(content, str):
            pieces.append(_piece(content, None, False))
        for block in blocks:
            for token, value in zip(
                block.get("tokens") or [], block.get("logprobs") or [], strict=False
            ):
                pieces.append(_piece(token, value, bool(block.get("tag"))))
    return pieces


def _piece(text: object, logprob: object, answer: object) -> dict[str, Any]:
    value = logprob if isinstance(logprob, int | float) else None
    return {"text": str(text), "logprob": value, "answer": bool(answer)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
