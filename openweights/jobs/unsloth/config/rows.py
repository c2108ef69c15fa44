"""Rows of a dataset, read and checked against the loss that will train on them.

Upload has checked that a row has its columns; here it is checked that this loss can learn from it.
Used by the client before a job is submitted and by the trainer for local files: no torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openweights.client.messages import (
    Problems,
    check_messages,
    check_pair,
    check_text,
    check_tools,
)
from openweights.client.questions import parse_question
from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.demonstrations import split_row
from openweights.jobs.unsloth.config.fields import DatasetRef, TrainingFields
from openweights.jobs.unsloth.config.grpo_fields import check_grpo_row
from openweights.models.templates.messages import Message, assistant_messages, plain_message

Row = Mapping[str, Any]
NumberedRow = tuple[int, dict[str, Any]]

PREFERENCE_LOSSES = ("dpo", "orpo")
_PAIR_FIELDS = ("prompt", "chosen", "rejected")


class FileRow(dict[str, Any]):
    """A row that knows the line of its file."""

    line = 0


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
        if line.strip():
            empty = False
            yield number, file_row(line, number)
    if empty:
        raise DatasetError("the file has no rows; write one JSON object a line")


def file_row(line: bytes, number: int) -> FileRow:
    """The row of a line.

    Raises:
        DatasetError: It is no JSON object; names the line.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"line {number}: no JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise DatasetError(f"line {number}: {type(row).__name__}, not an object; write {{…}}")
    numbered = FileRow(row)
    numbered.line = number
    return numbered


def check_rows(
    rows: Iterable[NumberedRow], config: TrainingFields, ref: DatasetRef, source: str = ""
) -> int:
    """See that `config.loss` can use every row, and count them.

    Args:
        ref: Of which dataset the rows are.
        source: The name of its file, where that is known.

    Raises:
        DatasetError: It cannot; a line for each of the first 20 rows, and how many more there are.
    """
    problems, count = Problems(ref.name), 0
    is_weightless = config.loss == "sft" and ref.field == "training_file"
    for number, row in rows:
        count += 1
        try:
            _check_row(row, config, ref.field)
            is_weightless = is_weightless and not _teaches(row, config.train_on)
        except ValueError as error:
            problems.add_error(number, error)
    problems.raise_if_any(rows=count, source=source)
    if ref.field != "training_file":
        return count
    if config.loss == "grpo":
        check_prompt_count(config, count)
    if config.holdout_fraction is not None:
        held_out(count, config.holdout_fraction)
    if is_weightless:
        raise DatasetError(
            f"{ref.name}: every weight is 0, so that there is nothing to learn; give what is to be "
            "learned another weight"
        )
    return count


def learned_keys(rows: Iterable[NumberedRow], keys: list[int]) -> Iterator[NumberedRow]:
    """The rows as they are; of each what stands for what is learned of it is added to `keys`."""
    for number, row in rows:
        learned = [row.get(column) for column in ("messages", "text", *_PAIR_FIELDS)]
        keys.append(hash(json.dumps(learned, sort_keys=True)))
        yield number, row


def overlap_note(training: Iterable[int], test: Sequence[int]) -> str | None:
    """What is said of a test set that has rows of the training set, by their keys."""
    learned = set(training)
    if not (both := sum(key in learned for key in test)):
        return None
    rows = f"all {both:,} rows" if both == len(test) else f"{both:,} of {len(test):,} rows"
    share = "" if both == len(test) else f" ({both / len(test):.1%})"
    return (
        f"test_file: {rows}{share} stand in training_file, too, so that its loss does not tell "
        "what was learned from what is only remembered; leave them out of one of the two"
    )


def run_steps(config: TrainingFields, rows: int) -> int:
    """Optimizer steps of a run of one process on so many training rows."""
    if config.max_steps is not None:
        return config.max_steps
    if config.holdout_fraction is not None:
        rows -= held_out(rows, config.holdout_fraction)
    if config.loss == "grpo":
        # Prompts that fill no step are left out by trl.
        return max(1, rows // prompts_in_step(config)) * config.epochs
    return max(1, math.ceil(rows / config.step_size)) * config.epochs


def held_out(rows: int, fraction: float) -> int:
    """How many of so many rows are the test set.

    Raises:
        DatasetError: There are too few for both.
    """
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise DatasetError(
            f"holdout_fraction: {fraction} of {rows} rows leaves none to train on; lower it, or "
            "give more rows"
        )
    return count


def prompts_in_step(config: TrainingFields, ranks: int = 1) -> int:
    """Prompts that a step of grpo answers."""
    return config.step_size * ranks // config.grpo_num_generations


def check_prompt_count(config: TrainingFields, prompts: int, ranks: int = 1) -> None:
    """See that there are enough prompts for a step of grpo.

    Raises:
        DatasetError: There are not.
    """
    needed = prompts_in_step(config, ranks)
    if prompts < needed:
        raise DatasetError(
            f"training_file: has {prompts} usable rows, but a step takes {needed} prompts "
            "(per_device_train_batch_size * gradient_accumulation_steps"
            f"{' * GPUs' if ranks > 1 else ''} / grpo_num_generations); add rows, or lower the "
            "batch"
        )


def _check_row(row: Row, config: TrainingFields, field: str) -> None:
    is_trained_on = field in ("training_file", "test_file") and config.loss != "grpo"
    if is_trained_on and row.get("weight") is not None:
        raise ValueError("weight: a row has none; give it to the messages that it is meant for")
    if field == "mcq_callbacks":
        parse_question(row)
    elif field == "sampling_callbacks":
        plain_messages(row)
    elif field == "logp_callback_datasets":
        check_answered(row)
    elif config.loss in PREFERENCE_LOSSES:
        preference_messages(row)
    elif config.loss == "grpo":
        _refuse_text(row, config.loss)
        plain_messages(row)
        check_grpo_row(row, config.grpo_reward_function)
        refuse_weights(row, config.loss)
    elif config.loss == "sdft" and field == "training_file":
        _refuse_text(row, config.loss)
        if "messages" in row:
            plain_messages(row)
        split_row(row)
        refuse_weights(row, config.loss)
    else:
        check_answered(row, needs_answer=config.train_on != "all")
        _check_weights(row, config)


def _refuse_text(row: Row, loss: str) -> None:
    """See that there is a conversation to answer.

    Raises:
        ValueError: The row is plain text.
    """
    if "text" in row and "messages" not in row:
        raise ValueError(
            f"text: is plain text, but loss={loss!r} samples answers to conversations; use "
            "loss='sft', or give the row 'messages'"
        )


def check_answered(row: Row, *, needs_answer: bool = True) -> None:
    """See that there is something to learn or to score: plain text, or an answer.

    Raises:
        ValueError: There is not.
    """
    if "messages" not in row:
        if "text" not in row:
            raise ValueError("messages: is missing; give the row 'messages' or 'text'")
        check_text(row["text"], "text", _refuse)
        return
    messages = plain_messages(row)
    answered = assistant_messages(messages) or any(weights(row))
    if needs_answer and not answered:
        raise ValueError(
            "messages: none is from the assistant, so there is nothing to learn; add the answer"
        )


def preference_messages(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of prompt, chosen and rejected answer.

    Raises:
        ValueError: One is missing, an answer repeats the prompt or does not end with the assistant,
            both are the same, or blocks have weights.
    """
    prompt, chosen, rejected = (plain_messages(row, field) for field in _PAIR_FIELDS)
    check_pair({field: row[field] for field in _PAIR_FIELDS}, _refuse)
    refuse_weights(row, "dpo and orpo", _PAIR_FIELDS)
    return prompt, chosen, rejected


def plain_messages(row: Row, field: str = "messages") -> list[Message]:
    """The row's messages with their content as one text each.

    Raises:
        ValueError: They are no list of messages, or one has a key that nothing reads.
    """
    if field not in row:
        raise ValueError(f"{field}: is missing; give it as a list of messages")
    check_messages(row[field], field, _refuse)
    if row.get("tools") is not None:
        check_tools(row["tools"], _refuse)
    return [plain_message(message) for message in row[field]]


def _refuse(field: str, problem: str) -> None:
    raise ValueError(f"{field}: {problem}")


# ---- weights -------------------------------------------------------------------------------------


def refuse_weights(row: Row, loss: str, fields: Sequence[str] = ("messages",)) -> None:
    """See that the row has no weight that would be ignored, by a loss that learns the last answer.

    Raises:
        ValueError: It has one.
    """
    for field in fields:
        messages: Sequence[Message] = row.get(field) or ()
        for index, message in enumerate(messages):
            is_last = field != "prompt" and (field != "messages" or index == len(messages) - 1)
            if _is_unheeded(message, is_learned=is_last):
                raise ValueError(
                    f"{field}[{index}]: has a weight, which {loss} cannot use; remove it, or use "
                    "loss='sft'"
                )


def _check_weights(row: Row, config: TrainingFields) -> None:
    if config.loss != "sft":
        refuse_weights(row, config.loss)
    elif config.train_on == "last" and "messages" in row:
        _refuse_other_weights(row)


def _refuse_other_weights(row: Row) -> None:
    """See that no message but the last answer has a weight that `train_on="last"` would ignore.

    Raises:
        ValueError: One has.
    """
    messages: Sequence[Message] = row["messages"]
    answers = assistant_messages(messages)
    for index, message in enumerate(messages):
        if index not in answers[-1:] and _is_unheeded(message, is_learned=False):
            raise ValueError(
                f"messages[{index}]: has a weight, and train_on='last' learns the last answer "
                "alone; remove it, or use train_on='responses'"
            )


def _is_unheeded(message: Message, *, is_learned: bool) -> bool:
    """Whether a weight says another thing than that the message is learned, or is not.

    What a 1 says of an answer that is only read is what OpenAI's format says of every answer.
    """
    is_answer = message["role"] == "assistant"
    heeded = (1,) if is_learned and is_answer else (0, 1) if is_answer else (0,)
    return any(weight not in heeded for weight in _of_message(message))


def _teaches(row: Row, train_on: str) -> bool:
    """Whether something is learned of a row that has messages, by their weights."""
    messages: Sequence[Message] = row.get("messages") or ()
    answers = assistant_messages(messages)
    learned = range(len(messages)) if train_on == "all" else answers
    counted = answers[-1:] if train_on == "last" else range(len(messages))
    return not messages or any(
        any(_of_message(message)) or (index in learned and _has_plain_part(message))
        for index, message in enumerate(messages)
        if index in counted
    )


def _has_plain_part(message: Message) -> bool:
    """Whether some of a message has no weight of its own."""
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{}]
    return message.get("weight") is None and any(b.get("weight") is None for b in blocks)


def is_weighted(row: Row) -> bool:
    """Whether a message of the row, or a block, has a weight of its own."""
    return any(True for _ in weights(row))


def weights(row: Row) -> Iterator[float]:
    """The weights that the messages of a conversation and their blocks have of their own."""
    for message in row.get("messages") or ():
        yield from _of_message(message)


def _of_message(message: Message) -> Iterator[float]:
    if message.get("weight") is not None:
        yield message["weight"]
    content = message.get("content")
    blocks = content if isinstance(content, list) else []
    yield from (block["weight"] for block in blocks if block.get("weight") is not None)
