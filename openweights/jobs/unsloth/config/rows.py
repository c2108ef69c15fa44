"""Rows of a dataset, read and checked against the loss that will train on them.

Upload has checked that a row has its columns; here it is checked that this loss can learn from it.
Used by the client before a job is submitted and by the trainer for local files: no torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openweights.client.questions import parse_question
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.demonstrations import split_row
from openweights.jobs.unsloth.config.fields import DatasetRef, TrainingFields
from openweights.jobs.unsloth.config.grpo_fields import check_grpo_row
from openweights.models.template import Message, flat_text

Row = Mapping[str, Any]
NumberedRow = tuple[int, dict[str, Any]]

LISTED_ERRORS = 20
PREFERENCE_LOSSES = ("dpo", "orpo")
_MESSAGE_FIELDS = ("messages", "prompt", "chosen", "rejected")


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


@contextmanager
def named_row(name: str, number: int) -> Iterator[None]:
    """Says of which row an error is.

    Raises:
        DatasetError: In place of a ValueError that is about the row.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise DatasetError(f"{name}: row {number}: {error}") from None


def check_rows(rows: Iterable[NumberedRow], config: TrainingFields, ref: DatasetRef) -> None:
    """See that `config.loss` can use every row.

    Args:
        ref: Of which dataset the rows are.

    Raises:
        DatasetError: It cannot; a line for each of the first 20 rows, and how many more there are.
    """
    problems: list[str] = []
    for number, row in rows:
        try:
            _check_row(row, config, ref.field)
        except ValueError as error:
            problems.append(f"{ref.name}:{number}: {error}")
    if problems:
        more = len(problems) - LISTED_ERRORS
        tail = [f"… and {more} more rows of {ref.name}"] if more > 0 else []
        raise DatasetError("\n".join([*problems[:LISTED_ERRORS], *tail]))


def _check_row(row: Row, config: TrainingFields, field: str) -> None:
    if field == "mcq_callbacks":
        parse_question(row)
    elif field == "sampling_callbacks":
        plain_messages(row)
    elif field == "logp_callback_datasets":
        check_answered(row)
    elif config.loss in PREFERENCE_LOSSES:
        preference_messages(row)
    elif config.loss == "grpo":
        plain_messages(row)
        check_grpo_row(row, config.grpo_reward_function)
        refuse_weights(row, config.loss)
    elif config.loss == "sdft" and field == "training_file":
        if "messages" in row:
            plain_messages(row)
        split_row(row)
        refuse_weights(row, config.loss)
    else:
        check_answered(row, needs_answer=config.train_on_responses_only)
        if config.loss != "sft":
            refuse_weights(row, config.loss)


def check_answered(row: Row, *, needs_answer: bool = True) -> None:
    """See that there is something to learn or to score: plain text, or an answer.

    Raises:
        ValueError: There is not.
    """
    if "messages" not in row:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise ValueError("messages: is missing; give the row 'messages' or 'text'")
        return
    messages = plain_messages(row)
    answered = any(m["role"] == "assistant" for m in messages) or any(block_weights(row))
    if needs_answer and not answered:
        raise ValueError(
            "messages: none is from the assistant, so there is nothing to learn; add the answer"
        )


def preference_messages(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of prompt, chosen and rejected answer.

    Raises:
        ValueError: One is missing, an answer does not end with the assistant, or blocks have
            weights.
    """
    prompt, chosen, rejected = (
        plain_messages(row, field) for field in ("prompt", "chosen", "rejected")
    )
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise ValueError(
                f"{field}[{len(answer) - 1}].role: is {answer[-1]['role']!r}; an answer ends with "
                "'assistant'"
            )
    refuse_weights(row, "dpo and orpo")
    return prompt, chosen, rejected


def refuse_weights(row: Row, loss: str) -> None:
    """See that no block of the row has a weight that would be ignored.

    Raises:
        ValueError: One has.
    """
    if any(weight != 1 for weight in block_weights(row)):
        raise ValueError(
            f"messages: a block has a weight, which {loss} cannot use; remove it, or use loss='sft'"
        )


def is_weighted(row: Row) -> bool:
    """Whether a block of the row has a weight of its own."""
    return any(True for _ in block_weights(row))


def block_weights(row: Row) -> Iterator[float]:
    """The weights that blocks of the row's messages have of their own."""
    for message in (m for field in _MESSAGE_FIELDS for m in row.get(field) or ()):
        blocks = [] if isinstance(message["content"], str) else message["content"]
        yield from (block["weight"] for block in blocks if block.get("weight") is not None)


def plain_messages(row: Row, field: str = "messages") -> list[Message]:
    """The row's messages with their content as one text each.

    Raises:
        ValueError: They are no list of messages.
    """
    given = row.get(field)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{field}: must be a list of messages; give at least one")
    return [_plain_message(message, f"{field}[{index}]") for index, message in enumerate(given)]


def _plain_message(message: Any, at: str) -> Message:
    try:
        return {"role": message["role"], "content": flat_text(message["content"])}
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{at}: must be an object with role and content; correct it") from None
