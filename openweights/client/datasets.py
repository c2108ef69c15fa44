"""Checks a dataset completely, in constant memory, before it is stored: a bad row must not cost a
GPU first.

Every problem is one line `FILE:LINE: field: what; remedy`; the first 20 are listed, the rest are
counted.

`conversations` rows hold `messages` (with at least one assistant message or a `demonstration`:
without them there would be nothing to train on) or `text`. `preference` rows hold `prompt`,
`chosen` and `rejected`, `multiple_choice` rows `question`, `choices` and `answer`. Other columns
are free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

from openweights.client.questions import parse_question
from openweights.errors import DatasetError

CHECKED_PURPOSES = ("conversations", "preference", "multiple_choice")
MAX_LINE_BYTES = 64 << 20
LISTED_ERRORS = 20

ROLES = ("system", "user", "assistant")
_ROLE_MEANT = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "developer": "system",
}
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
_UTF8_BOM = b"\xef\xbb\xbf"
_NAN = object()

Report = Callable[[str, str], None]


class _NotJSONError(Exception):
    """A line is not what we call JSON; the text says why and what to do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class _Problems:
    """Collects the problems of a file."""

    def __init__(self, name: str) -> None:
        self.count = 0
        self._name = name
        self._listed: list[str] = []

    def add(self, line: int, field: str, problem: str) -> None:
        self.count += 1
        if self.count <= LISTED_ERRORS:
            self._listed.append(f"{self._name}:{line}: {field}: {problem}")

    def at(self, line: int) -> Report:
        return lambda field, problem: self.add(line, field, problem)

    def raise_if_any(self) -> None:
        if not self.count:
            return
        more = self.count - len(self._listed)
        tail = [f"… and {more} more error{'s' if more > 1 else ''} in {self._name}"] if more else []
        raise DatasetError("\n".join(self._listed + tail))


def check_dataset(stream: BinaryIO, purpose: str, name: str) -> int:
    """Read `stream` to its end and check each row.

    Args:
        purpose: One of `CHECKED_PURPOSES`.
        name: File name for the messages.

    Returns:
        The number of rows.

    Raises:
        DatasetError: Rows cannot be used.
    """
    check_row = _ROW_CHECKS[purpose]
    problems = _Problems(name)
    rows = 0
    for number, raw in _lines(stream, problems):
        if not raw.strip():
            continue
        rows += 1
        report = problems.at(number)
        try:
            row = _parse(raw)
        except _NotJSONError as error:
            report(error.field, str(error))
            continue
        if not isinstance(row, dict):
            report("row", f"is {_kind(row)}, not an object; write each row as {{…}}")
            continue
        check_row(cast("dict[str, Any]", row), report)
    if not rows and not problems.count:
        problems.add(1, "file", "holds no rows; write one JSON object a line")
    problems.raise_if_any()
    return rows


# ---- lines and JSON ------------------------------------------------------------------------------


def _lines(stream: BinaryIO, problems: _Problems) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            whole_file = _not_lines(line)
            if whole_file is not None:
                problems.add(1, "file", whole_file)
                return
            if line.startswith(_UTF8_BOM):
                problems.add(
                    1, "file", "starts with a byte order mark; save it as UTF-8 without BOM"
                )
                line = line.removeprefix(_UTF8_BOM)
        if len(line) > MAX_LINE_BYTES:
            problems.add(number, "row", f"is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            continue
        yield number, line


def _not_lines(line: bytes) -> str | None:
    """Why the file as a whole cannot be JSON lines, judged by its beginning."""
    for start, (what, remedy) in _BINARY_STARTS.items():
        if line.startswith(start):
            return f"is {what}, not JSON lines; {remedy}"
    if line.strip() in (b"[", b"[{"):
        return "is a JSON array, not JSON lines; write one object a line, no brackets or commas"
    if line.strip() == b"{":
        return "holds objects over several lines; write each object on one line"
    return None


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = raw[error.start]
        raise _NotJSONError(
            "row",
            f"is not UTF-8 (byte 0x{wrong:02x} at position {error.start + 1}); save it as UTF-8",
        ) from None
    seen_nan = False

    def constant(name: str) -> object:
        nonlocal seen_nan
        seen_nan = True
        return _NAN

    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise _NotJSONError("row", _json_problem(error, text)) from None
    except RecursionError:
        raise _NotJSONError("row", "is nested too deeply; flatten it") from None
    except ValueError as error:
        raise _NotJSONError("row", f"is not JSON ({error}); shorten the number") from None
    if seen_nan:
        field = _path_of_nan(row, "") or "row"
        raise _NotJSONError(
            field, "is NaN or Infinity, which is not JSON; use a number or leave it out"
        )
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotJSONError(twice, "appears twice in one object; keep one of them")
    return result


def _path_of_nan(value: Any, at: str) -> str | None:
    if value is _NAN:
        return at
    items: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        items = ((f"{at}.{key}" if at else key, item) for key, item in mapping.items())
    elif isinstance(value, list):
        items = ((f"{at}[{index}]", item) for index, item in enumerate(cast("list[Any]", value)))
    else:
        return None
    return next((found for path, item in items if (found := _path_of_nan(item, path))), None)


def _json_problem(error: json.JSONDecodeError, text: str) -> str:
    if error.msg == "Extra data":
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
    if "demonstration" in row:
        _check_text(row["demonstration"], "demonstration", report)
    if has_messages and has_text:
        report("text", "stands beside 'messages'; keep one of the two")
    elif has_text:
        _check_text(row["text"], "text", report)
    elif not has_messages:
        report("messages", f"is missing{_column_hint(row)}")
    if not has_messages:
        return
    roles = _check_messages(row["messages"], "messages", report)
    if roles is not None and "assistant" not in roles and "demonstration" not in row:
        last = f"the last is of role {roles[-1]!r}"
        report(
            "messages",
            f"no message is of role 'assistant' ({last}), so there is nothing to train on; "
            "add the answer as the last message",
        )


def _check_preference(row: Mapping[str, Any], report: Report) -> None:
    for field in ("prompt", "chosen", "rejected"):
        if field not in row:
            hint = (
                "; upload conversations with purpose 'conversations'" if "messages" in row else ""
            )
            report(field, f"is missing{hint or '; give it as a list of messages'}")
            continue
        roles = _check_messages(row[field], field, report)
        if roles is not None and field != "prompt" and roles[-1] != "assistant":
            report(
                f"{field}[{len(roles) - 1}].role",
                f"is {roles[-1]!r}; an answer ends with 'assistant'",
            )
    if "chosen" in row and row["chosen"] == row.get("rejected"):
        report("rejected", "equals 'chosen', so there is no preference; remove the row")


def _check_question(row: Mapping[str, Any], report: Report) -> None:
    try:
        parse_question(row)
    except ValueError as error:
        report(*str(error).split(": ", 1))


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


def _check_messages(value: Any, field: str, report: Report) -> list[str] | None:
    """The roles of the messages, or None when something about them is wrong."""
    if not isinstance(value, list):
        report(field, f"is {_kind(value)}; make it a list of {{'role': …, 'content': …}}")
        return None
    messages = cast("list[Any]", value)
    if not messages:
        report(field, "is empty; give at least one message, or remove the row")
        return None
    roles = [
        _check_message(message, f"{field}[{index}]", report)
        for index, message in enumerate(messages)
    ]
    known = [role for role in roles if role is not None]
    return known if len(known) == len(roles) else None


def _check_message(value: Any, field: str, report: Report) -> str | None:
    if not isinstance(value, dict):
        report(field, f"is {_kind(value)}; make it {{'role': …, 'content': …}}")
        return None
    message = cast("dict[str, Any]", value)
    if "content" in message:
        _check_content(message["content"], f"{field}.content", report)
    else:
        hint = "rename 'value' to 'content'" if "value" in message else "add it"
        report(f"{field}.content", f"is missing; {hint}")
    if "role" not in message:
        hint = "rename 'from' to 'role'" if "from" in message else "add it"
        report(f"{field}.role", f"is missing; {hint}")
        return None
    return _check_role(message["role"], f"{field}.role", report)


def _check_role(role: Any, field: str, report: Report) -> str | None:
    if isinstance(role, str) and role in ROLES:
        return role
    shown = f"{role!r:.40}" if isinstance(role, str) else _kind(role)
    meant = role.lower() if isinstance(role, str) else ""
    meant = _ROLE_MEANT.get(meant, meant if meant in ROLES else "")
    remedy = f"write {meant!r}" if meant else "use 'system', 'user' or 'assistant'"
    report(field, f"is {shown}; {remedy}")
    return None


def _check_content(content: Any, field: str, report: Report) -> None:
    if not isinstance(content, list):
        _check_text(content, field, report, "a string or a list of text blocks")
        return
    blocks = cast("list[Any]", content)
    texts = [_check_block(block, f"{field}[{index}]", report) for index, block in enumerate(blocks)]
    if None not in texts and not "".join(text or "" for text in texts).strip():
        report(field, "is empty; give it text, or leave the message out")


def _check_block(value: Any, field: str, report: Report) -> str | None:
    if not isinstance(value, dict):
        report(field, f"is {_kind(value)}; make it {{'type': 'text', 'text': …}}")
        return None
    block = cast("dict[str, Any]", value)
    if block.get("type", "text") != "text":
        report(f"{field}.type", f"is {block['type']!r:.40}; only 'text' blocks can be trained on")
        return None
    if "weight" in block:
        weight = block["weight"]
        if not _is_finite(weight):
            report(f"{field}.weight", f"is {_kind(weight)}; make it a finite number")
    if not isinstance(block.get("tag", ""), str):
        report(f"{field}.tag", f"is {_kind(block['tag'])}; make it a string")
    if "text" not in block:
        report(f"{field}.text", "is missing; add it")
        return None
    text = block["text"]
    if not isinstance(text, str):
        report(f"{field}.text", f"is {_kind(text)}; make it a string")
        return None
    return text if _check_characters(text, f"{field}.text", report) else None


def _check_text(value: Any, field: str, report: Report, wanted: str = "a string") -> None:
    if not isinstance(value, str):
        report(
            field,
            f"is {_kind(value)}; make it {wanted}{', or leave it out' if value is None else ''}",
        )
    elif not value.strip():
        report(field, "is empty; give it text, or leave it out")
    else:
        _check_characters(value, field, report)


def _check_characters(text: str, field: str, report: Report) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        report(
            field,
            f"has half a surrogate pair at character {error.start + 1}; write the whole character",
        )
        return False
    return True


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    for kind, name in ((str, "a string"), (dict, "an object"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return f"the number {value}"
