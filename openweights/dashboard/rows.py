"""A stored dataset for people to look at: its rows, their lengths, and what would be refused.

Rows are shown as they are, or as a fine-tuning job reads them (`rendered.Reader`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, cast

from openweights.backends.base import Backend
from openweights.client.datasets import CHECKED_PURPOSES, check_dataset
from openweights.dashboard.rendered import Reader
from openweights.errors import DatasetError
from openweights.models.templates.messages import flat_text
from openweights.types import FileRecord

# Lengths are counted over so many rows at most.
_COUNTED = 50_000
_READ = 2_000  # rendered and tokenised
_LONGEST_LINE = 1 << 20
_SHOWN_BYTES = 2_000


def dataset_page(
    backend: Backend, file: FileRecord, offset: int, limit: int, reader: Reader | None = None
) -> dict[str, Any]:
    """Some rows of a JSON-lines file, each as parts of text with a role: `{rows, more}`.

    With a reader a row that it takes has `texts` instead: `[{title, stretches: [[text, weight]]}]`,
    and one that it refuses a `problem` beside its parts.
    """
    with backend.open_file(file.id) as content:
        lines = list(islice(_numbered(content), offset, offset + limit + 1))
    rows = [{"line": number, **_shown(line, reader)} for number, line in lines[:limit]]
    return {"rows": rows, "more": len(lines) > limit}


def _shown(line: bytes, reader: Reader | None) -> dict[str, Any]:
    row = _object(line)
    if reader is None or row is None:
        return _row(line)
    try:
        texts = reader.texts(row)
    except ValueError as error:
        return {**_row(line), "problem": str(error)}
    return {"texts": [{"title": title, "stretches": pieces} for title, pieces in texts]}


def dataset_summary(
    backend: Backend, file: FileRecord, reader: Reader | None = None, buckets: int = 40
) -> dict[str, Any]:
    """`{rows, counted, unit, lengths: {edges, counts}, problems}` of the whole file.

    `problems` are the lines that a check at upload would print, or the reader's job at submission;
    with a reader lengths are in tokens, else in characters.
    """
    lengths: list[int] = []
    rows, most = 0, _COUNTED if reader is None else _READ
    with backend.open_file(file.id) as content:
        for _, line in _numbered(content):
            rows += 1
            if rows <= most and (length := _length(line, reader)) is not None:
                lengths.append(length)
    return {
        "rows": rows,
        "counted": len(lengths),
        "unit": "characters" if reader is None else "tokens",
        "lengths": histogram(lengths, buckets),
        "problems": _problems(backend, file, reader),
    }


def _length(line: bytes, reader: Reader | None) -> int | None:
    if reader is None:
        return sum(len(part["text"]) for part in _row(line)["parts"])
    row = _object(line)
    try:
        return None if row is None else reader.tokens(reader.texts(row))
    except ValueError:
        return None


def histogram(values: Sequence[int], buckets: int) -> dict[str, list[float]]:
    """Counts of values in `buckets` intervals of equal width: `{edges, counts}`."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), max(values)
    width = (high - low) / buckets or 1.0
    counts = [0.0] * buckets
    for value in values:
        counts[min(int((value - low) / width), buckets - 1)] += 1
    return {"edges": [low + width * index for index in range(buckets + 1)], "counts": counts}


def _problems(backend: Backend, file: FileRecord, reader: Reader | None) -> list[str]:
    if reader is None and file.purpose not in CHECKED_PURPOSES:
        return []
    try:
        with backend.open_file(file.id) as content:
            if reader is None:
                check_dataset(content, file.purpose, file.filename)
            else:
                reader.check(content)
        if reader is not None:
            with backend.open_file(file.id) as content:
                reader.check_rendering(content, _READ)
    except DatasetError as error:
        return str(error).splitlines()
    return []


def _numbered(content: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(content, start=1):
        if line.strip():
            yield number, line


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where there is none, or it is too long to look at."""
    if len(line) > _LONGEST_LINE:
        return None
    try:
        row: object = json.loads(line)
    except ValueError:
        return None
    return cast("dict[str, Any]", row) if isinstance(row, dict) else None


def _row(line: bytes) -> dict[str, Any]:
    """`{parts: [{role, text, learned}], other}`; what cannot be read is one part `unreadable`."""
    row = _object(line)
    if row is None:
        return {
            "parts": [_part("unreadable", line[:_SHOWN_BYTES].decode(errors="replace"))],
            "other": {},
        }
    known = {"messages", "text", "prompt", "chosen", "rejected", "demonstration"}
    other = {key: value for key, value in row.items() if key not in known}
    return {"parts": _parts(row), "other": other}


def _parts(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for message in _messages(row.get("messages")):
        role = str(message.get("role", "?"))
        weight = message.get("weight", 1)
        learned = role == "assistant" and weight != 0
        parts += [_part(f"{role}{what}", text, learned) for what, text in _said(message)]
    for name in ("prompt", "chosen", "rejected"):
        said = row.get(name)
        text = said if isinstance(said, str) else "\n".join(map(_line_of, _messages(said)))
        if said is not None:
            parts.append(_part(name, text, name == "chosen"))
    if isinstance(row.get("text"), str):
        parts.append(_part("text", str(row["text"]), True))
    if row.get("demonstration"):
        parts.append(_part("demonstration", flat_text(row["demonstration"]), False))
    return parts


def _messages(value: object) -> list[dict[str, Any]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, Any]", item) for item in items if isinstance(item, dict)]


def _line_of(message: Mapping[str, Any]) -> str:
    role = message.get("role", "?")
    return "\n".join(f"{role}{what}: {text}" for what, text in _said(message))


def _said(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a message says, each with how: thinking, content, and calls."""
    thinking, content = message.get("reasoning_content"), flat_text(message.get("content"))
    said = [(", thinking", str(thinking))] if thinking else []
    calls = [(", calls", _call(call)) for call in _messages(message.get("tool_calls"))]
    return said + ([("", content)] if content or not (said or calls) else []) + calls


def _call(call: Mapping[str, Any]) -> str:
    (function,) = _messages([call.get("function")]) or [dict[str, Any]()]
    arguments: object = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function.get('name', '?')} {text}"


def _part(role: str, text: str, learned: bool = False) -> dict[str, Any]:
    return {"role": role, "text": text, "learned": learned}
