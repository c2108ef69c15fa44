"""What a conversation's messages may hold, checked where a file is uploaded and where it is read.

The keys are those of OpenAI's format: `role`, `content` (a text, or blocks of text), `weight`,
`name`, `tool_calls`, `tool_call_id`, and `reasoning_content` besides. A key with null counts as
left out, and so does an empty list of calls; any other key is refused, since nothing would read it.
Whether a chat template writes a key is known where there is a tokenizer (`models/templates/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from openweights.errors import DatasetError, shown
from openweights.json_values import (
    UnfitJSONError,
    is_deep,
    read_json,
    rewritten_number,
    texts_of,
)
from openweights.models.templates.messages import Message, plain_message

Report = Callable[[str, str], None]  # field, what is wrong; what to do

LISTED_ERRORS = 20
ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_MEANT = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function": "tool",
}
_MESSAGE_KEYS = (
    *("role", "content", "weight", "name", "reasoning_content", "tool_calls", "tool_call_id"),
)
_CALL_KEYS = ("type", "id", "function")
_FUNCTION_KEYS = ("name", "arguments")
_LEAST_WEIGHT = 1e-20
_BLOCK_KEYS = ("type", "text", "weight", "tag")
# What other formats call the keys that a message must have.
_CALLED_ELSEWHERE = {
    "role": ("from", "speaker", "author", "sender", "user"),
    "content": ("value", "text", "message", "body", "contents", "response"),
}
_KEY_MEANT = {
    "thinking": "reasoning_content",
    "reasoning": "reasoning_content",
    "function_call": "tool_calls",
    "weights": "weight",
}


class Problems:
    """Collects what is wrong with the rows of a file, one line each: `NAME:LINE: field: what`."""

    def __init__(self, name: str) -> None:
        self.count = 0
        self.name = name
        self._listed: list[str] = []
        self._lines = 0
        self._last_line = -1
        self._fields: set[str] = set()
        self._kinds: set[str] = set()

    def add(self, line: int, field: str, problem: str, kind: str = "") -> None:
        """One problem; `field` may be empty. `kind` is the same for those that are one fault,
        however they are worded.
        """
        self.count += 1
        for seen, value in ((self._kinds, kind or problem), (self._fields, field)):
            if len(seen) < 2:  # whether there are several is all that is asked
                seen.add(value)
        if self.count <= LISTED_ERRORS:
            place = f"{self.name}:{line}: " + (f"{field}: " if field else "")
            # Half characters of what is wrong must not stop a terminal from saying so.
            self._listed.append(f"{place}{problem}".encode(errors="backslashreplace").decode())
        self._lines += line != self._last_line
        self._last_line = line

    def at(self, line: int) -> Report:
        """`add` for a line."""
        return lambda field, problem: self.add(line, field, problem)

    def add_error(self, line: int, error: ValueError) -> None:
        """A problem that was raised as `field: what`."""
        field, colon, problem = str(error).partition(": ")
        self.add(line, field if colon else "", problem if colon else field)

    def raise_if_any(self, *, rows: int = 0, source: str = "", by_line: bool = False) -> None:
        """Say all of them; once, where each of many rows has the same.

        Args:
            rows: How many were looked at.
            source: The file that they are in, where its name is another one.
            by_line: Whether the first is named by its line, even where all are the same.

        Raises:
            DatasetError: There is a problem.
        """
        if not self.count:
            return
        of = f"{self._lines:,} of {rows:,} row{'' if rows == 1 else 's'} of {source or self.name}"
        tail = [f"({of} cannot be used)"] if rows and source else []
        is_one = len(self._kinds) == 1 and 1 < rows == self._lines == self.count
        if is_one and by_line:
            raise DatasetError(f"{self._listed[0]} (so it is with all {rows:,} rows)")
        if is_one:
            field = f"{self._fields.pop()}: " if len(self._fields) == 1 else ""
            first = f"{self.name}: every row: {field}{self._kinds.pop()}"
            raise DatasetError("\n".join([first, *tail]))
        if more := self.count - len(self._listed):
            errors = f"… and {more} more error{'s' if more > 1 else ''}"
            what = f"; {of} cannot be used" if rows and not source else f" in {self.name}"
            self._listed.append(errors + what)
        raise DatasetError("\n".join(self._listed + tail))


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """The messages before a last answer, and its text; None where the row does not end with one.

    Raises:
        ValueError: There are no messages, or the answer is more than a text.
    """
    if "messages" not in row:
        raise ValueError("messages: is missing; conversations are needed here, not plain text")
    messages = [plain_message(message) for message in row["messages"]]
    if not messages or messages[-1]["role"] != "assistant":
        return messages, None
    answer = messages.pop()
    for key in ("reasoning_content", "tool_calls"):
        if key in answer:
            raise ValueError(
                f"messages[{len(messages)}].{key}: this loss compares texts; write it into the "
                "content, as the model would (<think>…</think>)"
            )
    return messages, answer["content"]


def check_messages(value: Any, field: str, report: Report) -> list[str] | None:
    """The roles of the messages, or None when something about them is wrong."""
    if not isinstance(value, list):
        report(field, f"is {kind(value)}; make it a list of {{'role': …, 'content': …}}")
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
    if len(known) < len(roles):
        return None
    _check_answered_calls(cast("list[Mapping[str, Any]]", messages), field, report)
    return known


def _check_answered_calls(
    messages: Sequence[Mapping[str, Any]], field: str, report: Report
) -> None:
    """See that what a tool says answers a call before it, where calls have ids."""
    ids: set[object] = set()
    for index, message in enumerate(messages):
        calls = message.get("tool_calls")
        listed = cast("list[Any]", calls) if isinstance(calls, list) else []
        ids |= {str(given) for call in listed if (given := _as_object(call).get("id"))}
        answered = message.get("tool_call_id")
        if isinstance(answered, str) and ids and answered not in ids:
            report(
                f"{field}[{index}].tool_call_id",
                f"{answered!r} is the id of no call before it; correct it, or remove it",
            )


def check_tools(value: Any, report: Report) -> None:
    """See that a row's `tools` are schemas of functions."""
    tools = cast("list[Any]", value) if isinstance(value, list) else None
    if not tools:
        report("tools", f"is {_no_list(value)} of functions, or leave it out")
        return
    for index, tool in enumerate(tools):
        field, given = f"tools[{index}]", _as_object(tool)
        function = _as_object(given.get("function", given))
        inner = f"{field}.function" if "function" in given else field
        name, parameters = function.get("name"), function.get("parameters")
        description = function.get("description")
        if not isinstance(name, str) or not name.strip():
            report(field, "is no function; make it {'type': 'function', 'function': {'name': …}}")
        elif parameters is not None and not isinstance(parameters, dict):
            report(f"{inner}.parameters", f"is {kind(parameters)}; make it a JSON schema")
        elif description is not None and not isinstance(description, str):
            report(f"{inner}.description", f"is {kind(description)}; make it a string")
        else:
            _check_written(given, field, report)


def _check_written(value: Any, field: str, report: Report) -> bool:
    """Whether a template can write the parts of a value as they are."""
    if is_deep(value):
        report(field, "is nested too deeply; flatten it")
        return False
    if found := rewritten_number(value, field):
        place, number = found
        report(place, f"is {number.written}, which a template writes as {number!r}; write that")
        return False
    return all([_check_characters(text, place, report) for place, text in texts_of(value, field)])


def _check_message(value: Any, field: str, report: Report) -> str | None:
    if not isinstance(value, dict):
        report(field, f"is {kind(value)}; make it {{'role': …, 'content': …}}")
        return None
    message = cast("dict[str, Any]", value)
    given = {
        key: item
        for key, item in message.items()
        if item is not None and not (key == "tool_calls" and item == [])
    }
    has_calls = "tool_calls" in given
    if "content" in message:
        if not (has_calls and message["content"] in (None, "")):
            _check_content(message["content"], f"{field}.content", report)
    elif not has_calls:
        _say_missing("content", message, field, report)
    if "role" not in message:
        _say_missing("role", message, field, report)
        return None
    role = _check_role(message["role"], f"{field}.role", report)
    if role is not None:
        # What stands in the place of the content was named with it.
        stands_in = None if "content" in message else _standing_in("content", message)
        _check_keys({k: v for k, v in given.items() if k != stands_in}, role, field, report)
    return role


def _standing_in(key: str, message: Mapping[str, Any]) -> str | None:
    """What a message has in the place of a key that it lacks."""
    return next(
        (name for name in _CALLED_ELSEWHERE[key] if isinstance(message.get(name), str)), None
    )


def _say_missing(key: str, message: Mapping[str, Any], field: str, report: Report) -> None:
    name = _standing_in(key, message)
    report(f"{field}.{key}", f"is missing; {f'rename {name!r} to {key!r}' if name else 'add it'}")


def _check_keys(message: Mapping[str, Any], role: str, field: str, report: Report) -> None:
    """See that every key beside role and content is one that is read."""
    for key in message.keys() - set(_MESSAGE_KEYS):
        meant = _KEY_MEANT.get(key)
        remedy = f"rename it to {meant!r}" if meant else "remove it"
        report(f"{field}.{key}", f"is no key that anything reads; {remedy}")
    if "weight" in message:
        _check_weight(message["weight"], f"{field}.weight", report)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message:
            check_text(message[key], f"{field}.{key}", report)
    own = {"reasoning_content": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}
    for key in own.keys() & message.keys():
        if role != own[key]:
            report(f"{field}.{key}", f"belongs to {own[key]!r}, not to {role!r}; remove it")
    if "tool_calls" in message:
        _check_calls(message["tool_calls"], f"{field}.tool_calls", report)
    structured = {"reasoning_content", "tool_calls"} & message.keys()
    if structured and isinstance(message.get("content"), list):
        report(f"{field}.content", f"is a list beside {structured.pop()!r}; make it one text")


def _check_calls(value: Any, field: str, report: Report) -> None:
    calls = cast("list[Any]", value) if isinstance(value, list) else None
    if not calls:
        report(field, f"is {_no_list(value)} of calls, or leave it out")
        return
    for index, item in enumerate(calls):
        _check_call(_as_object(item), f"{field}[{index}]", report)


def _check_call(call: Mapping[str, Any], field: str, report: Report) -> None:
    function = _as_object(call.get("function"))
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or call.get("type", "function") != "function":
        report(
            field,
            "is no call of a function; make it {'type': 'function', 'function': {'name': …, "
            "'arguments': …}}",
        )
        return
    known = ((field, call, _CALL_KEYS), (f"{field}.function", function, _FUNCTION_KEYS))
    for place, given, keys in known:
        for key in given.keys() - set(keys):
            if given[key] is not None:
                report(f"{place}.{key}", "is no key that anything reads; remove it")
    if call.get("id") is not None:
        check_text(call["id"], f"{field}.id", report)
    _check_characters(name, f"{field}.function.name", report)
    _check_arguments(function.get("arguments"), f"{field}.function.arguments", report)


def _check_arguments(value: Any, field: str, report: Report) -> None:
    """See that arguments, which templates read as an object, come back as they were written."""
    try:
        parsed = read_json(value) if isinstance(value, str) else value
    except UnfitJSONError as error:
        report(f"{field}.{error.field}" if error.field else field, str(error))
        return
    except ValueError:
        parsed = [value]
    if isinstance(parsed, dict):
        _check_written(parsed, field, report)
    elif value is not None:
        report(field, "are no JSON object; write them as one, or as its text")


def _no_list(value: Any) -> str:
    return "an empty list; make it one" if value == [] else f"{kind(value)}; make it a list"


def _as_object(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _check_role(role: Any, field: str, report: Report) -> str | None:
    if isinstance(role, str) and role in ROLES:
        return role
    wrong = f"{role!r:.40}" if isinstance(role, str) else kind(role)
    meant = role.lower() if isinstance(role, str) else ""
    meant = _ROLE_MEANT.get(meant, meant if meant in ROLES else "")
    remedy = f"write {meant!r}" if meant else "use 'system', 'user', 'assistant' or 'tool'"
    report(field, f"is {wrong}; {remedy}")
    return None


def _check_content(content: Any, field: str, report: Report) -> None:
    if not isinstance(content, list):
        check_text(content, field, report, "a string or a list of text blocks")
        return
    blocks = cast("list[Any]", content)
    texts = [_check_block(block, f"{field}[{index}]", report) for index, block in enumerate(blocks)]
    if None not in texts and not "".join(text or "" for text in texts).strip():
        report(field, "is empty; give it text, or leave the message out")


def _check_block(value: Any, field: str, report: Report) -> str | None:
    if not isinstance(value, dict):
        report(field, f"is {kind(value)}; make it {{'type': 'text', 'text': …}}")
        return None
    given = cast("dict[str, Any]", value)
    block = {key: item for key, item in given.items() if item is not None or key == "text"}
    if block.get("type", "text") != "text":
        report(f"{field}.type", f"is {block['type']!r:.40}; only 'text' blocks can be trained on")
        return None
    for key in block.keys() - set(_BLOCK_KEYS):
        report(f"{field}.{key}", "is no key that anything reads; remove it")
    if "weight" in block:
        _check_weight(block["weight"], f"{field}.weight", report)
    if not isinstance(block.get("tag", ""), str):
        report(f"{field}.tag", f"is {kind(block['tag'])}; make it a string")
    if "text" not in block:
        report(f"{field}.text", "is missing; add it")
        return None
    text = block["text"]
    if not isinstance(text, str):
        report(f"{field}.text", f"is {kind(text)}; make it a string")
        return None
    return text if _check_characters(text, f"{field}.text", report) else None


def check_text(value: Any, field: str, report: Report, wanted: str = "a string") -> None:
    """See that a value is text with something in it."""
    if not isinstance(value, str):
        report(
            field,
            f"is {kind(value)}; make it {wanted}{', or leave it out' if value is None else ''}",
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


def _check_weight(value: Any, field: str, report: Report) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        report(field, f"is {kind(value)}; make it a finite number")
    elif value and not _LEAST_WEIGHT <= abs(value) <= 1 / _LEAST_WEIGHT:
        report(
            field,
            f"is {kind(value)}, which 32-bit sums cannot hold; make it 0, or of a size from "
            f"{_LEAST_WEIGHT} to {1 / _LEAST_WEIGHT}",
        )


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    for type_, name in ((str, "a string"), (dict, "an object"), (list, "a list")):
        if isinstance(value, type_):
            return name
    return f"the number {shown(value)}"


# ---- answers to compare --------------------------------------------------------------------------


def check_pair(row: Mapping[str, Sequence[Mapping[str, Any]]], report: Report) -> None:
    """See that two answers to a prompt can be compared; their messages have been checked."""
    prompt, *answers = (
        [plain_message(message) for message in row[field]]
        for field in ("prompt", "chosen", "rejected")
    )
    for field, answer in zip(("chosen", "rejected"), answers, strict=True):
        if _repeats(prompt, answer):
            report(field, "begins with the prompt's end, which would be read twice; leave it out")
        elif answer[-1]["role"] != "assistant":
            wrong = answer[-1]["role"]
            report(f"{field}[{len(answer) - 1}].role", f"is {wrong!r}; end it with 'assistant'")
    if _without_ids(answers[0]) == _without_ids(answers[1]):
        report("rejected", "equals 'chosen', so there is no preference; remove the row")


def _repeats(prompt: Sequence[Message], answer: Sequence[Message]) -> bool:
    """Whether an answer begins with the prompt's end, perhaps behind a system text of its own, or
    with other white space at the ends of its messages, which templates trim.
    """
    asked, said = ([_trimmed(message) for message in messages] for messages in (prompt, answer))
    own = next((i for i, m in enumerate(said) if m["role"] not in ("system", "developer")), 0)
    counts = range(1, len(asked) + 1)
    return any(said[start:][:count] == asked[-count:] for start in {0, own} for count in counts)


def _trimmed(message: Message) -> Message:
    return {key: text.strip() if isinstance(text, str) else text for key, text in message.items()}


def _without_ids(messages: Sequence[Message]) -> list[Message]:
    """Messages without the ids of calls, which say nothing."""
    return [
        {
            key: [{**call, "id": None} for call in value] if key == "tool_calls" else value
            for key, value in message.items()
            if key != "tool_call_id"
        }
        for message in messages
    ]
