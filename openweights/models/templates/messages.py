"""A conversation as chat templates read it: messages of one text each, and calls of functions.

No torch here, nor in any file of this folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

Message = dict[str, Any]


class MessageError(ValueError):
    """What a message says would not be what is read or learned.

    Attributes:
        message: Its index.
        problem: What is wrong, beginning with what follows the message's own place.
    """

    def __init__(self, message: int, problem: str) -> None:
        super().__init__(f"messages[{message}]{problem}")
        self.message = message
        self.problem = problem


def flat_text(content: object) -> str:
    """A message's content as one string, whether it is one, a list of text blocks, or nothing."""
    if isinstance(content, str):
        return content
    blocks = cast("list[object]", content) if isinstance(content, list | tuple) else []
    found = [cast("Mapping[str, Any]", block) for block in blocks if isinstance(block, Mapping)]
    return "".join(str(block.get("text", "")) for block in found)


def plain_message(message: Mapping[str, Any]) -> Message:
    """A checked message as chat templates read it: one text, arguments of calls as objects."""
    plain: Message = {"role": message["role"], "content": flat_text(message.get("content"))}
    for key in ("name", "reasoning_content", "tool_call_id"):
        if message.get(key) is not None:
            plain[key] = message[key]
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function: Mapping[str, Any] = call["function"]
    arguments: Any = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def assistant_messages(messages: Sequence[Message]) -> list[int]:
    """The indices of what the assistant says."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def is_structured(message: Message) -> bool:
    """Whether the template writes more of the message than its content."""
    return bool(message.get("reasoning_content") or message.get("tool_calls"))
