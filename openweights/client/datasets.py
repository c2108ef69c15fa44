"""Checks a dataset completely, in constant memory, before it is stored: a bad row must not cost a
GPU first.

Every problem is one line `FILE:LINE: field: what; remedy`; the first 20 are listed, the rest are
counted.

`conversations` rows hold `messages` (see `messages.py`) and perhaps `tools`, or `text`. Prompts
without an answer are taken: they can be sampled from; whether a loss can learn from a row is
checked when a job is submitted. `preference` rows hold `prompt`, `chosen` and `rejected`,
`multiple_choice` rows `question`, `choices` and `answer`. Other columns are free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from openweights.client.messages import (
    Problems,
    Report,
    check_messages,
    check_pair,
    check_text,
    check_tools,
    kind,
)
from openweights.client.questions import parse_question
from openweights.errors import DatasetError, shown
from openweights.json_values import UnfitJSONError, read_json
from openweights.models.templates.messages import plain_message

CHECKED_PURPOSES = ("conversations", "preference", "multiple_choice")
MAX_LINE_BYTES = 64 << 20
ROWS_NAME = "rows.jsonl"  # what rows that come from no file are called
TOKEN_BYTES = 4  # on average, of texts in European languages

_COLUMN_MEANT = {
    "message": "messages",
    "conversation": "messages",
    "conversations": "messages",
    "dialog": "messages",
    "dialogue": "messages",
}
_BINARY_STARTS = {
    b"\x1f\x8b": ("a gzip file", "unpack it first"),
    b"PK\x03\x04": ("a zip file", "unpack it first"),
    b"PAR1": ("a Parquet file", "convert it to JSON lines"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"ARROW1": ("an Arrow file", "convert it to JSON lines"),
}
_BINARY = "is binary, not JSON lines; convert it to text in UTF-8 with one JSON object a line"
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class DatasetSummary:
    """What a dataset holds, as far as that can be told without a model's tokenizer.

    Attributes:
        answers: What a loss can learn of it: answers, texts, or pairs of answers.
        size: Of all its texts, in bytes of UTF-8.
        learned: Of that what is learned.
        unit: What the answers are called.
    """

    rows: int = 0
    answers: int = 0
    size: int = 0
    learned: int = 0
    unit: str = "answer"

    def words(self) -> str:
        """As in `192 rows, about 14,000 tokens of text, without the chat template's marks; 192
        answers to learn, about 3,100 tokens`.

        Tokenizers take about four bytes for a token, most of the time. What a template writes
        around short messages may be more than they are, and is known where the model is.
        """
        rows = f"{counted(self.rows, 'row')}, about {_tokens(self.size):,} tokens of text"
        if self.unit == "question":
            return rows
        if self.unit != "text":
            rows += ", without the chat template's marks"
        if not self.answers:
            return f"{rows}; no answers to learn"
        answers = counted(self.answers, self.unit)
        return f"{rows}; {answers} to learn, about {_tokens(self.learned):,} tokens"

    def add(self, row: Mapping[str, Any], purpose: str) -> None:
        """Count a row that was found to be right."""
        self.rows += 1
        if purpose == "multiple_choice":
            self.unit = "question"
            self._add_text(_length([row["question"], *row["choices"]]), 0)
        elif purpose == "preference":
            self.unit = "pair"
            learned = sum(_message_length(m) for side in _SIDES for m in row[side])
            self._add_text(sum(map(_message_length, row["prompt"])), 0, answers=0)
            self._add_text(learned, learned)
        elif "text" in row:
            self.unit = "text"
            self._add_text(_length([row["text"]]), _length([row["text"]]))
        else:
            for message in row["messages"]:
                size = _message_length(message)
                learned = _learned_length(message, size)
                self._add_text(size, learned, answers=int(learned > 0))

    def _add_text(self, size: int, learned: int, answers: int = 1) -> None:
        self.size += size
        self.learned += learned
        self.answers += answers if learned else 0


_SIDES = ("chosen", "rejected")


def counted(count: int, noun: str) -> str:
    """As in `1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _tokens(size: int) -> int:
    """Two digits of it: it is an estimate."""
    count = max(size // TOKEN_BYTES, int(size > 0))
    step = 10 ** max(0, len(str(count)) - 2)
    return round(count / step) * step


def _length(texts: Iterable[str]) -> int:
    return sum(
        len(text) if text.isascii() else len(text.encode(errors="replace")) for text in texts
    )


def _message_length(message: Mapping[str, Any]) -> int:
    plain = plain_message(message)
    calls = [json.dumps(call) for call in plain.get("tool_calls", ())]
    return _length([plain["content"], plain.get("reasoning_content") or "", *calls])


def _learned_length(message: Mapping[str, Any], size: int) -> int:
    """Of what is learned by its own weight, its blocks', or since the assistant says it.

    Args:
        size: Of the message.
    """
    own = message.get("weight")
    usual = bool(own) if own is not None else message["role"] == "assistant"
    content = message.get("content")
    if not isinstance(content, list):
        return size if usual else 0
    blocks = cast("list[Mapping[str, Any]]", content)
    weights = [usual if b.get("weight") is None else bool(b["weight"]) for b in blocks]
    return _length(b["text"] for b, is_learned in zip(blocks, weights, strict=True) if is_learned)


def check_dataset(stream: BinaryIO, purpose: str, name: str) -> DatasetSummary:
    """Read `stream` to its end and check each row.

    Args:
        purpose: One of `CHECKED_PURPOSES`.
        name: File name for the messages.

    Returns:
        What it holds.

    Raises:
        DatasetError: Rows cannot be used.
    """
    check_row = _ROW_CHECKS[purpose]
    problems = Problems(name)
    summary = DatasetSummary()
    count = 0
    for number, raw in _lines(stream, problems, purpose):
        if not raw.strip():
            continue
        count += 1
        report, before = problems.at(number), problems.count
        try:
            row = _parse(raw)
        except UnfitJSONError as error:
            if not summary.rows and b"\0" in raw:
                raise DatasetError(f"{name}:1: file: {_BINARY}") from None
            # Lines that are no JSON are so in many ways: of a table, it is one fault.
            is_json = error.field != "row"
            problems.add(number, error.field or "row", str(error), "" if is_json else "no JSON")
            continue
        if not isinstance(row, dict):
            whole = isinstance(row, list) and _array_remedy(name, purpose)
            report("row", f"is {kind(row)}, not an object; {whole or 'write each row as {…}'}")
            continue
        if count == 1 and (recipe := conversion(cast("dict[str, Any]", row), purpose, name)):
            report("row", recipe)
            problems.raise_if_any()
        check_row(cast("dict[str, Any]", row), report)
        if problems.count == before:
            summary.add(cast("dict[str, Any]", row), purpose)
    if not count and not problems.count:
        problems.add(1, "file", "holds no rows; write one JSON object a line")
    problems.raise_if_any(rows=count, by_line=True)
    return summary


# ---- lines and JSON ------------------------------------------------------------------------------


def _lines(stream: BinaryIO, problems: Problems, purpose: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            whole_file = _not_lines(line, _array_remedy(problems.name, purpose))
            if whole_file is not None:
                problems.add(1, "file", whole_file)
                return
            line = line.removeprefix(_UTF8_BOM)  # so does whoever reads the stored file
        if len(line) > MAX_LINE_BYTES:
            problems.add(number, "row", f"is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            continue
        yield number, line


def _not_lines(line: bytes, array_remedy: str) -> str | None:
    """Why the file as a whole cannot be JSON lines, judged by its beginning."""
    for start, (what, remedy) in _BINARY_STARTS.items():
        if line.startswith(start):
            return f"is {what}, not JSON lines; {remedy}"
    if line.strip() in (b"[", b"[{"):
        return f"is a JSON array, not JSON lines; {array_remedy}"
    if line.strip() == b"{":
        return "holds objects over several lines; write each object on one line"
    return None


def _array_remedy(name: str, purpose: str) -> str:
    load = f"json.load(open({json.dumps(name)}))"
    return f"pass its rows, as ow.files.upload({load}, purpose={json.dumps(purpose)})"


def _parse(raw: bytes) -> Any:
    """A line's value.

    Raises:
        UnfitJSONError: It is not what we call JSON.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = raw[error.start]
        raise UnfitJSONError(
            "row",
            f"is not UTF-8 (byte 0x{wrong:02x} at position {error.start + 1}); save it as UTF-8",
        ) from None
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        raise UnfitJSONError("row", _json_problem(error, text)) from None


def _json_problem(error: json.JSONDecodeError, text: str) -> str:
    if error.msg == "Extra data":
        if text[error.pos :].strip() == ",":
            return "ends with a comma; remove the commas between the rows, JSON lines have none"
        if "\r" in text.strip():
            return (
                "has more than one JSON value, with CR line ends; save the file with LF line ends"
            )
        return (
            f"has more than one JSON value (at column {error.colno}); put each on a line of its own"
        )
    if text.strip().startswith("{'"):
        return "is not JSON: it has single quotes; write it with json.dumps, not str"
    if text[error.pos : error.pos + 4] in ("True", "Fals", "None"):
        return f"is not JSON: Python's literal at column {error.colno}; write true, false or null"
    what = error.msg.removesuffix(" at")
    if what.startswith(("Unterminated string", "Invalid control character")):
        what = "a string does not end, or holds a raw line break or tab"
        return f"is not JSON: {what}, at column {error.colno}; write those as \\n and \\t"
    return f"is not JSON ({what} at column {error.colno}); write one JSON object a line"


# ---- rows ----------------------------------------------------------------------------------------


def _check_conversation(row: Mapping[str, Any], report: Report) -> None:
    has_messages, has_text = "messages" in row, "text" in row
    for field in ("demonstration", "gold_response"):
        if field in row:
            check_text(row[field], field, report)
    if row.get("tools") is not None:
        check_tools(row["tools"], report)
        if has_text and not has_messages:
            report("tools", "stands beside 'text', which is read as it is; write them into it")
    _check_options(row, report)
    if has_messages and has_text:
        report("text", "stands beside 'messages'; keep one of the two")
    elif has_text:
        check_text(row["text"], "text", report)
    elif not has_messages:
        report("messages", f"is missing{_column_hint(row)}")
    if not has_messages:
        return
    roles = check_messages(row["messages"], "messages", report)
    if roles is not None and "assistant" not in roles and roles[-1] not in ("user", "tool"):
        report(
            "messages",
            f"has no answer, and the last is of role {roles[-1]!r}, so there is nothing to answer; "
            "add what the user asks",
        )


_AS_MESSAGE = "is read as a message alone; put it first among them, with the role 'system'"
_OF_JOB = "is not read row by row; give the job {} instead"
_OPTIONS_MEANT = {
    "functions": "is the older name; write them as 'tools'",
    "parallel_tool_calls": "is an option of a request, which nothing reads here; remove it",
    "tool_choice": "is an option of a request, which nothing reads here; remove it",
    "chat_template_kwargs": _OF_JOB.format("template_options"),
    "template_options": _OF_JOB.format("template_options"),
    "train_on": _OF_JOB.format("train_on"),
    "system": _AS_MESSAGE,
    "system_prompt": _AS_MESSAGE,
}


def _check_options(row: Mapping[str, Any], report: Report) -> None:
    """See that no column says how the row is to be read in a way that nothing heeds."""
    for column, problem in _OPTIONS_MEANT.items():
        if row.get(column) is not None:
            report(column, problem)


def _check_preference(row: Mapping[str, Any], report: Report) -> None:
    wrong: list[str] = []

    def noted(field: str, problem: str) -> None:
        wrong.append(field)
        report(field, problem)

    fields = ("prompt", *_SIDES)
    # One line for a row, not one for each: that of another format has none of them.
    if missing := [field for field in fields if field not in row]:
        hint = "upload conversations with purpose 'conversations'"
        remedy = hint if "messages" in row else "give a list of messages"
        verb = "is" if len(missing) == 1 else "are"
        noted(" and ".join(missing), f"{verb} missing; {remedy}")
    for field in fields:
        if field in row:
            check_messages(row[field], field, noted)
    if row.get("tools") is not None:
        check_tools(row["tools"], report)
    _check_options(row, report)
    if not wrong:
        check_pair(row, report)


def _check_question(row: Mapping[str, Any], report: Report) -> None:
    try:
        parse_question(row)
    except ValueError as error:
        report(*str(error).split(": ", 1))


# ---- files that are given for a dataset --------------------------------------------------------

HOLD = {
    "conversations": "conversations",
    "preference": "pairs of answers ('prompt', 'chosen', 'rejected')",
    "multiple_choice": "questions with choices",
}


def no_dataset(given: str, purpose: str) -> str:
    """What is said of a text that is neither the id of a dataset nor the path of one."""
    upload = f'ow.files.upload(path, purpose="{purpose}")["id"]'
    if os.path.isdir(given):
        return f"{shown(given)} is a folder; give the file in it that holds {HOLD[purpose]}"
    if os.path.exists(given):
        return f"{shown(given)} is a pipe or a device, not a file; give {upload}"
    return f"{shown(given)} is neither a file id ({purpose}:file-…) nor a local file; give {upload}"


def other_purpose(path: str, purpose: str) -> str | None:
    """The purpose that a local file's rows have, where they are clearly of another than that.

    It is told by the columns of the first row; what is no row at all is for `check_dataset`.
    """
    try:
        with open(path, "rb") as file:
            lines = (
                line.removeprefix(_UTF8_BOM)
                for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            )
            first = next((line for line in lines if line.strip()), b"")
        row = _parse(first)
    except (OSError, UnfitJSONError):
        return None
    found = _purposes(cast("dict[str, Any]", row)) if isinstance(row, dict) else []
    return found[0] if found and purpose not in found else None


def _purposes(row: Mapping[str, Any]) -> list[str]:
    """Those that a row with these columns may have; a conversation may have columns of others."""
    return [
        purpose
        for purpose, is_so in {
            "preference": bool({"chosen", "rejected"} & row.keys()),
            "multiple_choice": {"question", "choices"} <= row.keys(),
            "conversations": bool({"messages", "text"} & row.keys()) or _as_messages(row),
        }.items()
        if is_so
    ]


# ---- rows of other formats -----------------------------------------------------------------------

# What a question and its answer are called elsewhere, by the names of the two columns.
_QUESTION_NAMES = ("prompt", "instruction", "question", "query", "input")
_ANSWER_NAMES = ("completion", "response", "output", "answer")
_ROLES = '{"human": "user", "gpt": "assistant"}'


def conversion(row: Mapping[str, Any], purpose: str, name: str) -> str | None:
    """What makes rows of another well-known format ours, in Python; None for all other rows."""
    known = {"conversations": _as_messages, "preference": _as_pair}
    found = known[purpose](row) if purpose in known else None
    if found is None:
        return None
    whose, made = found
    lines = [f"rows = [{made} for row in rows]"]
    lines.append(f"ow.files.upload(rows, purpose={json.dumps(purpose)})")
    if name != ROWS_NAME:
        opened = f"open({json.dumps(name)})"
        read = f"rows = [json.loads(line) for line in {opened} if line.strip()]"
        lines = ["import json", read, *lines]
    return "\n    ".join([f"is {whose}; these lines make such rows ours, and upload them:", *lines])


def _as_messages(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The format, and an expression of `row` that gives a row of ours."""
    if "messages" in row or "text" in row:
        return None
    for column in ("conversations", "conversation"):
        said = row.get(column)
        first = cast("list[object]", said)[0] if isinstance(said, list) and said else None
        if isinstance(first, dict) and {"from", "value"} <= first.keys():
            own = '[{"from": "system", "value": row["system"]}] * bool(row.get("system")) + '
            turns = f"{own if 'system' in row else ''}{_of_row(column)}"
            role = f'{_ROLES}.get(m["from"], m["from"])'
            message = f'{{"role": {role}, "content": m["value"]}}'
            return "in ShareGPT's format", f'{{"messages": [{message} for m in {turns}]}}'
    asked, said = _text_columns(row, _QUESTION_NAMES), _text_columns(row, _ANSWER_NAMES)
    if asked and said:
        more = "input" if asked == "instruction" and "input" in row else None
        question = _of_row(asked)
        if more:
            question = f'"\\n\\n".join(filter(None, [{question}, row["input"]]))'
        whose = "in Alpaca's format" if more else f"a pair of {asked!r} and {said!r}"
        messages = ", ".join([_message("user", question), _message("assistant", _of_row(said))])
        return whose, f'{{"messages": [{messages}]}}'
    parts = ("prompt", "completion")
    if all(isinstance(row.get(part), list) for part in parts):
        return "a prompt and its completion", '{"messages": row["prompt"] + row["completion"]}'
    return None


def _as_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """As `_as_messages`, for rows with two answers."""
    if all(isinstance(row.get(field), str) for field in ("prompt", *_SIDES)):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        made = [f'"{f}": [{_message(role, _of_row(f))}]' for f, role in roles.items()]
        return "three texts", f"{{{', '.join(made)}}}"
    if "prompt" not in row and all(isinstance(row.get(field), list) for field in _SIDES):
        made = '"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:]'
        return "without a prompt", f'{{{made}, "rejected": row["rejected"][-1:]}}'
    return None


def _text_columns(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of the columns that the row has, if it holds a text."""
    name = next((name for name in names if name in row), None)
    return name if name is not None and isinstance(row[name], str) else None


def _of_row(column: str) -> str:
    return f'row["{column}"]'


def _message(role: str, content: str) -> str:
    return f'{{"role": "{role}", "content": {content}}}'


_ROW_CHECKS = {
    "conversations": _check_conversation,
    "preference": _check_preference,
    "multiple_choice": _check_question,
}


def _column_hint(row: Mapping[str, Any]) -> str:
    if {"chosen", "rejected"} & row.keys():
        return "; upload rows with 'chosen' and 'rejected' with purpose 'preference'"
    for column in row:
        if _COLUMN_MEANT.get(column.lower()) or column.lower() == "messages":
            return f"; rename {column!r} to 'messages'"
    if "prompt" in row:
        return "; write the prompt as a message of role 'user', its answer as one of 'assistant'"
    names = ", ".join(repr(name) for name in list(row)[:5])
    return f" (the row has {names or 'nothing'}); give each row 'messages' or 'text'"
