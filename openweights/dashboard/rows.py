"""A stored dataset for people to look at: its rows, their lengths, and what would be refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, cast

from openweights.backends.base import Backend
from openweights.client.datasets import CHECKED_PURPOSES, check_dataset
from openweights.dashboard.samples import content_text
from openweights.errors import DatasetError
from openweights.types import FileRecord

# Lengths are counted over so many rows at most.
_COUNTED = 50_000
_LONGEST_LINE = 1 << 20


def dataset_page(backend: Backend, file: FileRecord, offset: int, limit: int) -> dict[str, Any]:
    """Some rows of a JSON-lines file, each as parts of text with a role: `{rows, more}`."""
    with backend.open_file(file.id) as content:
        lines = list(islice(_numbered(content), offset, offset + limit + 1))
    rows = [{"line": number, **_row(line)} for number, line in lines[:limit]]
    return {"rows": rows, "more": len(lines) > limit}


def dataset_summary(backend: Backend, file: FileRecord, buckets: int = 40) -> dict[str, Any]:
    """`{rows, counted, characters: {edges, counts}, problems}` of the whole file.

    `problems` are the lines that a check at upload would print.
    """
    lengths: list[int] = []
    rows = 0
    with backend.open_file(file.id) as content:
        for _, line in _numbered(content):
            rows += 1
            if rows <= _COUNTED:
                lengths.append(sum(len(part["text"]) for part in _row(line)["parts"]))
    return {
        "rows": rows,
        "counted": len(lengths),
        "characters": histogram(lengths, buckets),
        "problems": _problems(backend, file),
    }


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


def _problems(backend: Backend, file: FileRecord) -> list[str]:
    if file.purpose not in CHECKED_PURPOSES:
        return []
    with backend.open_file(file.id) as content:
        try:
            check_dataset(content, file.purpose, file.filename)
        except DatasetError as error:
            return str(error).splitlines()
    return []


def _numbered(content: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(content, start=1):
        if line.strip():
            yield number, line


def _row(line: bytes) -> dict[str, Any]:
    """`{parts: [{role, text, learned}], other}`; what cannot be read is one part `unreadable`."""
    if len(line) > _LONGEST_LINE:
        return {"parts": [_part("unreadable", line[:500].decode(errors="replace"))], "other": {}}
    try:
        row: object = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        return {"parts": [_part("unreadable", line.decode(errors="replace"))], "other": {}}
    values = cast("dict[str, Any]", row)
    known = {"messages", "text", "prompt", "chosen", "rejected", "demonstration"}
    return {
        "parts": _parts(values),
        "other": {key: value for key, value in values.items() if key not in known},
    }


def _parts(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for message in _messages(row.get("messages")):
        role = str(message.get("role", "?"))
        weight = message.get("weight", 1)
        parts.append(
            _part(role, content_text(message.get("content")), role == "assistant" and weight != 0)
        )
    for name in ("prompt", "chosen", "rejected"):
        said = row.get(name)
        text = said if isinstance(said, str) else "\n".join(map(_line_of, _messages(said)))
        if said is not None:
            parts.append(_part(name, text, name == "chosen"))
    if isinstance(row.get("text"), str):
        parts.append(_part("text", str(row["text"]), True))
    if row.get("demonstration"):
        parts.append(_part("demonstration", content_text(row["demonstration"]), False))
    return parts


def _messages(value: object) -> list[dict[str, Any]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, Any]", item) for item in items if isinstance(item, dict)]


def _line_of(message: Mapping[str, Any]) -> str:
    return f"{message.get('role', '?')}: {content_text(message.get('content'))}"


def _part(role: str, text: str, learned: bool = False) -> dict[str, Any]:
    return {"role": role, "text": text, "learned": learned}
