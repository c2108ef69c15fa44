"""Rows of a `conversations` file, read and checked against the loss that will train on them.

Upload has checked that a row is a conversation; here it is checked that this loss can learn from
it. Used by the client before a job is submitted and by the trainer for local files: no torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openweights.errors import DatasetError
from openweights.jobs.unsloth.demonstrations import Message, flat_text, split_row
from openweights.jobs.unsloth.validate import TrainingConfig

Row = Mapping[str, Any]
NumberedRow = tuple[int, dict[str, Any]]

LISTED_ERRORS = 20


def read_rows(source: str | Path | Iterable[bytes]) -> list[dict[str, Any]]:
    """Rows of a JSONL file, given as a path or as its lines.

    Raises:
        DatasetError: A line is no JSON object, or there is none; names the line.
    """
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return read_rows(file)
    return [row for _, row in numbered_rows(source)]


def numbered_rows(lines: Iterable[bytes]) -> Iterator[NumberedRow]:
    """Each row with the number of its line.

    Raises:
        DatasetError: As `read_rows`.
    """
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(
                f"line {number}: no JSON ({error}); write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise DatasetError(f"line {number}: {type(row).__name__}, not an object; write {{…}}")
        empty = False
        yield number, row
    if empty:
        raise DatasetError("the file has no rows; write one JSON object a line")


def check_rows(rows: Iterable[NumberedRow], config: TrainingConfig, *, name: str) -> None:
    """See that `config.loss` can use every row.

    Args:
        name: The file, for the messages.

    Raises:
        DatasetError: It cannot; a line for each of the first 20 rows, and how many more there are.
    """
    problems: list[str] = []
    for number, row in rows:
        try:
            _check_row(row, config, name)
        except ValueError as error:
            problems.append(f"{name}:{number}: {error}")
    if problems:
        more = len(problems) - LISTED_ERRORS
        tail = [f"… and {more} more rows of {name}"] if more > 0 else []
        raise DatasetError("\n".join([*problems[:LISTED_ERRORS], *tail]))


def _check_row(row: Row, config: TrainingConfig, name: str) -> None:
    if name.startswith("sampling_callbacks"):
        plain_messages(row)
        return
    on_policy = config.loss == "sdft" and name == "training_file"
    if "messages" not in row and not on_policy:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise ValueError("messages: is missing; give the row 'messages' or 'text'")
        return
    messages = plain_messages(row) if "messages" in row else []
    if on_policy:
        split_row(row)
    elif config.train_on_responses_only and not any(m["role"] == "assistant" for m in messages):
        raise ValueError(
            "messages: none is from the assistant, so there is nothing to learn; add the answer"
        )


def plain_messages(row: Row) -> list[Message]:
    """The row's messages with their content as one text each.

    Raises:
        ValueError: They are no list of messages, or have weights, which are not available yet.
    """
    given = row.get("messages")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError("messages: must be a list of messages; give at least one")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _plain_message(message: Any, at: str) -> Message:
    try:
        role, content = message["role"], message["content"]
        blocks = [] if isinstance(content, str) else content
        weighted = any(block.get("weight", 1) != 1 for block in blocks)
        text = flat_text(content)
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{at}: must be an object with role and content; correct it") from None
    if weighted:
        raise ValueError(f"{at}: token weights are not available yet; remove 'weight'")
    return {"role": role, "content": text}
