"""A conversation that is rendered with marks in place of its texts.

It shows what the template writes: headers, ends of turns, an inserted think block, and where each
text goes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from openweights.errors import ConfigError
from openweights.models.templates.marks import Mark, Marking
from openweights.models.templates.messages import Message
from openweights.models.templates.template import Shape, Template, rendered_once

# An answer with thinking: the opening tag, which a generation prompt may have written already,
# the thinking, the closing tag, the rest.
_THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A marked conversation.

    Attributes:
        messages: With marks.
        said: What the mark of each message's part stands for.
        text: Rendered.
        marks: In the order in which they were written.
    """

    messages: list[Message]
    said: dict[tuple[int, str], str]
    text: str
    marks: tuple[Mark, ...]
    marking: Marking
    shape: Shape

    def marks_of(self, message: int) -> list[Mark]:
        """Those of a message, each where it was written first."""
        first: dict[tuple[int, str], Mark] = {}
        for mark in self.marks:
            first.setdefault(mark.key, mark)
        return [mark for mark in first.values() if mark.message == message]

    def before(self, message: int) -> str:
        """What stands between a message and the one before it."""
        own = self.marks_of(message)
        if not own:
            return ""
        before = [mark.stop for mark in self.marks if mark.start < own[0].start]
        return self.text[max(before, default=0) : own[0].start]

    def said_by(self, mark: Mark) -> str:
        return self.said[mark.key]

    def filled(self, text: str) -> str:
        """A text with what they stand for in place of its marks."""
        parts, done = list[str](), 0
        for mark in self.marking.found(text):
            parts += [text[done : mark.start], self.said_by(mark)]
            done = mark.stop
        return "".join([*parts, text[done:]])


def scaffold_of(
    template: Template, messages: Sequence[Message], *, prompt: bool, verbatim: Collection[int]
) -> Scaffold:
    """The marked conversation, rendered.

    Raises:
        ValueError: The template refuses it.
    """
    for marking in Marking.all():
        said: dict[tuple[int, str], str] = {}
        marked = [
            _marked(index, message, marking, said, whole=index in verbatim)
            for index, message in enumerate(messages)
        ]
        shape = template.shape(marked, prompt=prompt)
        if marking.is_unique(shape, said.values()):
            return _rendered(marked, said, marking, shape)
    raise AssertionError("there are more words than a row has texts")


def _rendered(
    marked: list[Message], said: dict[tuple[int, str], str], marking: Marking, shape: Shape
) -> Scaffold:
    try:
        text = rendered_once(shape)
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(marking.hidden(str(error))) from None
    return Scaffold(marked, said, text, marking.found(text), marking, shape)


def _marked(
    index: int,
    message: Message,
    marking: Marking,
    said: dict[tuple[int, str], str],
    *,
    whole: bool,
) -> Message:
    """The message with marks in place of its texts; `said` is told what they stand for."""

    def mark(part: str, text: str) -> str:
        said[index, part] = text
        return marking.written(index, part) if text else ""

    content = message["content"]
    thought = None
    if message["role"] == "assistant" and not whole:
        thought = _THOUGHT.fullmatch(content)
    if thought:
        opened, thinking, closed, answer = thought.groups()
        content = opened + mark("THOUGHT", thinking) + closed + mark("TEXT", answer)
    elif content:
        content = mark("TEXT", content)
    marked = {**message, "content": content}
    if message.get("reasoning_content"):
        marked["reasoning_content"] = mark("REASONING", message["reasoning_content"])
    if message.get("name"):
        marked["name"] = mark("NAME", message["name"])
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": mark("CALL" + "X" * number, name)}}
            for number, call in enumerate(message["tool_calls"])
            if (name := call["function"]["name"])
        ]
    return marked


def unmarked_beginning(message: Message) -> str:
    """What an answer has before its first mark: tags of thinking, and white space beside them."""
    thought = _THOUGHT.fullmatch(message["content"])
    if message["role"] != "assistant" or thought is None:
        return ""
    opened, thinking, closed, _ = thought.groups()
    return opened if thinking else opened + closed


def scaffold_of_roles(tokenizer: Any, *roles: str) -> Scaffold | None:
    """A scaffold of a text by each role; None where the template refuses that, or there is none."""
    messages: list[Message] = [{"role": role, "content": "?"} for role in roles]
    try:
        return scaffold_of(Template(tokenizer, None, {}), messages, prompt=False, verbatim=())
    except ValueError:
        return None
