"""What a chat template makes of a conversation, found out by asking it, and whether it is what the
messages say.

A conversation is rendered twice, once as it is and once with marks in place of its texts. The
marked one, the *scaffold*, shows headers, ends of turns, an inserted think block, and where each
text goes. The other must be the scaffold with the texts in their places. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from openweights.errors import ConfigError

Message = dict[str, Any]

MARK = "MARK-{index}-{part}-KRAM"
MARKS = re.compile(r"MARK-(\d+)-([A-Z]+)-KRAM")
# An answer with thinking: the opening tag, which a generation prompt may have written already,
# the thinking, the closing tag, the rest.
_THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)

TRIMMED = "the chat template trims white space at the ends of what is read"
FORGOTTEN = "the chat template leaves out the thinking of earlier answers, as it does when sampling"


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


@dataclass(frozen=True, slots=True)
class Template:
    """A tokenizer's template, with the tools and options of one conversation."""

    tokenizer: Any  # transformers annotates its tokenizers in part only
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "chat_template: the model's tokenizer has none; give one, or choose an instruct "
                "model"
            )
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                tools=self.tools or None,
                add_generation_prompt=prompt,
                **self.options,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template refuses it ({error}); correct the messages"
            ) from None

    def scaffold(self, marked: Sequence[Message], *, prompt: bool = False) -> str:
        """`render` of marked messages, which are the same for all conversations of one shape."""
        asked = json.dumps([marked, self.tools, self.options, prompt])
        # Some templates write the date.
        return _rendered_once(
            self.tokenizer, str(self.tokenizer.chat_template), date.today(), asked
        )


@lru_cache(maxsize=2048)
def _rendered_once(tokenizer: Any, template: str, today: date, asked: str) -> str:
    marked, tools, options, prompt = json.loads(asked)
    return Template(tokenizer, tools, options).render(marked, prompt=prompt)


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A marked conversation.

    Attributes:
        messages: With marks.
        said: What each mark stands for.
        text: Rendered.
        marks: In the order in which they were written.
    """

    messages: list[Message]
    said: dict[str, str]
    text: str
    marks: list[re.Match[str]]

    def marks_of(self, message: int) -> list[re.Match[str]]:
        return [mark for mark in self.marks if int(mark[1]) == message]


def scaffold_of(
    template: Template, messages: Sequence[Message], *, prompt: bool, verbatim: Collection[int]
) -> Scaffold:
    said: dict[str, str] = {}
    marked = [
        _marked(index, message, said, whole=index in verbatim)
        for index, message in enumerate(messages)
    ]
    text = template.scaffold(marked, prompt=prompt)
    return Scaffold(marked, said, text, list(MARKS.finditer(text)))


def _marked(index: int, message: Message, said: dict[str, str], *, whole: bool) -> Message:
    """The message with marks in place of its texts; `said` is told what they stand for."""

    def mark(part: str, text: str) -> str:
        name = MARK.format(index=index, part=part)
        said[name] = text
        return name if text else ""

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
        marked["reasoning_content"] = mark("THOUGHT", message["reasoning_content"])
    if message.get("name"):
        marked["name"] = mark("NAME", message["name"])
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": mark("CALL" + "X" * number, name)}}
            for number, call in enumerate(message["tool_calls"])
            if (name := call["function"]["name"])
        ]
    return marked


# ---- comparing -----------------------------------------------------------------------------------


def compared(
    template: Template,
    messages: Sequence[Message],
    *,
    kept: Collection[int] = (),
    prompt: bool = False,
    verbatim: Collection[int] = (),
) -> tuple[Scaffold, str, list[str], set[str]]:
    """Scaffold, rendered text, what the text shows in place of each mark, and notes.

    Args:
        kept: Messages that are learned.
        verbatim: Messages whose mark stays in the text.

    Raises:
        MessageError: Something is lost.
    """
    scaffold = scaffold_of(template, messages, prompt=prompt, verbatim=verbatim)
    notes = _missing(scaffold, messages, kept)
    said = {m: m if int(_index(m)) in verbatim else text for m, text in scaffold.said.items()}
    real = [scaffold.messages[i] if i in verbatim else m for i, m in enumerate(messages)]
    text = template.render(real, prompt=prompt)
    shown = list(_walk(scaffold, said, text))
    for mark, here in zip(scaffold.marks, shown, strict=True):
        index, whole = int(mark[1]), said[mark[0]]
        if here != whole and index not in kept:
            _check_indentation(index, whole, here)
            notes.add(TRIMMED)
    return scaffold, text, shown, notes


def _index(mark: str) -> str:
    return mark.split("-", 2)[1]


def _missing(scaffold: Scaffold, messages: Sequence[Message], kept: Collection[int]) -> set[str]:
    """Notes on what the template leaves out and may.

    Raises:
        MessageError: It leaves out what it may not, or writes something twice.
    """
    written = [mark[0] for mark in scaffold.marks]
    notes: set[str] = set()
    for mark, text in scaffold.said.items():
        _, index, part, _ = mark.split("-")
        count, number = written.count(mark), int(index)
        if not text or count == 1:
            continue
        if count > 1:
            raise MessageError(number, f": {_REWRITTEN}")
        if part == "THOUGHT" and number not in kept:
            notes.add(FORGOTTEN)
            continue
        is_last = number == len(messages) - 1
        raise MessageError(number, dropped(messages[number], part, is_last=is_last))
    return notes


_REWRITTEN = (
    "the chat template rewrites messages, so that what is learned would not be what the row says; "
    "give a chat_template that keeps them as they are"
)


def dropped(message: Message, part: str, *, is_last: bool) -> str:
    """What to say of a part of a message that the template leaves out."""
    if part == "THOUGHT" and not is_last:
        return (
            ": the chat template drops the thinking of an answer that is not the last; set "
            "train_on='last', or give each answer a row of its own"
        )
    if part == "THOUGHT":
        place = ".reasoning_content" if message.get("reasoning_content") else ""
        return f"{place}: the chat template drops the thinking; give a chat_template that keeps it"
    if part == "NAME":
        return (
            ".name: the chat template does not write it; remove it, or give a chat_template that "
            "does"
        )
    if part.startswith("CALL"):
        return (
            ".tool_calls: the chat template does not write them; write the call into the content, "
            "or give a chat_template that does"
        )
    if message["role"] == "system":
        return (
            ": the chat template drops the system text; give a chat_template that keeps it, or "
            "move the text into the user's message"
        )
    return (
        f": the chat template drops what {message['role']!r} says; give a chat_template that keeps "
        "it, or another role"
    )


def _walk(scaffold: Scaffold, said: Mapping[str, str], text: str) -> Iterator[str]:
    """What `text` shows in place of each mark.

    Raises:
        MessageError: `text` is not the scaffold with the texts in place of the marks.
    """
    marks = scaffold.marks
    stops = [*(mark.start() for mark in marks), len(scaffold.text)]
    position = stops[0]
    matches = text.startswith(scaffold.text[: stops[0]])
    for mark, stop in zip(marks, stops[1:], strict=True):
        piece = scaffold.text[mark.end() : stop]
        shown = _shown(text, position, said[mark[0]], piece) if matches else None
        if shown is None:
            raise MessageError(int(mark[1]), f": {_REWRITTEN}")
        yield shown
        position += len(shown) + len(piece)
    if not matches or position != len(text):
        raise ValueError(_REWRITTEN)


def _shown(text: str, start: int, said: str, piece: str) -> str | None:
    """The text at `start`, whole or with white space trimmed, if `piece` follows it."""
    core = said.strip()
    lead = said.find(core)
    found = text.find(core, start, start + lead + len(core))
    if found < 0 or said[lead - (found - start) : lead] != text[start:found]:
        return None
    stop = found + len(core)
    tail = said[lead + len(core) :]
    for length in range(len(tail), -1, -1):
        if text.startswith(piece, stop + length) and text.startswith(tail[:length], stop):
            return text[start : stop + length]
    return None


def _check_indentation(index: int, said: str, shown: str) -> None:
    """Without the indentation of its first line, code and lists mean something else."""
    lost = said[: len(said) - len(said.lstrip())].removesuffix(
        shown[: len(shown) - len(shown.lstrip())]
    )
    if lost and lost[-1] in " \t" and "\n" in said.strip():
        raise MessageError(
            index,
            ": the chat template trims the indentation of its first line; begin it with a line of "
            "words, or give a chat_template that does not trim",
        )
