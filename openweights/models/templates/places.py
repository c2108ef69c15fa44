"""Where a message is in a scaffold: its text, and the token that ends its turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix

from openweights.models.templates.comparison import dropped
from openweights.models.templates.ends import end_token, space_behind
from openweights.models.templates.messages import Message, MessageError, is_structured
from openweights.models.templates.scaffold import Scaffold, unmarked_beginning
from openweights.models.templates.template import Template

_THINK_OPEN = re.compile(r"<think>\s*(?:</think>\s*)?\Z")

_THINK_CLOSED = re.compile(r"</think>\s*\Z")

INSERTED = (
    "before an answer the chat template writes {text}, which is not in the prompt that is sampled "
    "from; see template_options"
)

UNENDED = (
    "behind an answer that is not the last the chat template writes no token that ends a "
    "completion, so that its end is not learned; set train_on='last', or give each answer a row of "
    "its own"
)

DIFFERS = (
    "the prompt that is sampled from ends with {text}, where the chat template writes {written} "
    "before an answer that is given; see template_options"
)

INTERWOVEN = (
    ": the chat template writes other messages amid this one, such as what a function returned "
    "between a call and the text beside it; give the call and the text messages of their own, or "
    "another chat_template"
)


def place_of(
    template: Template,
    scaffold: Scaffold,
    messages: Sequence[Message],
    index: int,
    is_learned: bool,
    ends: Sequence[str],
    notes: set[str],
) -> tuple[int, tuple[int, int, int], str]:
    """A message, its place in the scaffold, and what the template writes before an answer beside
    the prompt; `notes` are told of that.
    """
    prompt = _prompt_before(template, scaffold, index) if is_learned else None
    agrees = prompt is not None and scaffold.text.startswith(prompt)
    asked = len(prompt) if prompt and agrees else None
    opened = _THINK_OPEN.search(prompt) if prompt and not agrees else None
    if prompt and opened and scaffold.text.startswith(prompt[: opened.start()]):
        asked = opened.start() if is_structured(messages[index]) else None
        _check_tags(scaffold, messages, index)
    place = _place(template, scaffold, messages, index, asked, ends)
    inserted = "" if asked is None else scaffold.text[asked : place[0]]
    if inserted.strip():
        notes.add(INSERTED.format(text=repr(inserted)))
    elif prompt and not agrees:
        line = prompt.rfind("\n", 0, _common(prompt, scaffold.text)) + 1
        asked_with, written = (
            repr(_shortened(scaffold.marking.hidden(text)))
            for text in (prompt[line:], scaffold.text[line : scaffold.marks_of(index)[0].start])
        )
        notes.add(DIFFERS.format(text=asked_with, written=written))
    if is_learned and index < len(messages) - 1 and place[1] == place[2]:
        notes.add(UNENDED)
    return index, place, inserted


def _check_tags(scaffold: Scaffold, messages: Sequence[Message], index: int) -> None:
    """See that the tags with which an answer begins are written, where its prompt opens the
    thinking.

    Raises:
        MessageError: They are cut off, as by R1's template.
    """
    own, beginning = scaffold.marks_of(index), unmarked_beginning(messages[index])
    if own and beginning and not _size_before(beginning, scaffold.text[: own[0].start]):
        is_last = index == len(messages) - 1
        raise MessageError(index, dropped(messages[index], "THOUGHT", is_last=is_last))


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _common(first: str, second: str) -> int:
    return len(commonprefix([first, second]))


def _prompt_before(template: Template, scaffold: Scaffold, index: int) -> str | None:
    """The scaffold of the prompt with which the model is asked for an answer; None where the
    template knows none.

    Raises:
        MessageError: The prompt holds other texts than stand before the answer.
    """
    if not index:
        return None
    try:
        prompt = template.scaffold(scaffold.messages[:index], prompt=True)
    except ValueError:
        return None
    own = scaffold.marks_of(index)
    first = own[0].start if own else len(scaffold.text)
    before = [mark.key for mark in scaffold.marks if mark.message < index or mark.start < first]
    if before != [mark.key for mark in scaffold.marking.found(prompt)]:
        raise MessageError(
            index,
            ": the chat template puts other texts before it here than when the model is asked for "
            "it; set train_on='last', or give each answer a row of its own",
        )
    return prompt


def _place(
    template: Template,
    scaffold: Scaffold,
    messages: Sequence[Message],
    index: int,
    asked: int | None,
    ends: Sequence[str],
) -> tuple[int, int, int]:
    """Start and stop of a message in the scaffold, and where the end token behind it ends."""
    own, message, text = scaffold.marks_of(index), messages[index], scaffold.text
    if not own:
        raise MessageError(
            index,
            ": holds nothing but tags of thinking, which the chat template may write anyway; give "
            "it text, or remove it",
        )
    first, last = own[0].start, own[-1].stop
    if any(mark.message != index and first < mark.start < last for mark in scaffold.marks):
        raise MessageError(index, INTERWOVEN)
    following = next((mark.start for mark in scaffold.marks if mark.start >= last), len(text))
    if is_structured(message):
        end = end_token(ends, text[last:following])
        is_open = end is None and index == len(messages) - 1
        left = _left_open(template, scaffold, last, ends) if is_open else None
        if left is not None and asked is not None and asked <= first:
            return asked, left, left
        if asked is None or asked > first or end is None:
            raise MessageError(
                index,
                ": the chat template hides where this answer with calls or thinking begins or "
                "ends; write it as one content, or give another chat_template",
            )
        return asked, last + end.start(1), last + end.end()
    beginning = unmarked_beginning(message)
    # A prompt may have opened the thinking already, and ends with white space that is its own.
    begun = 0 if "<think>" in beginning else asked or 0
    before = text[begun:first]
    cut = "" if asked is None else text[asked:first]  # where the tags are, what is left of them
    first -= _size_before(beginning, before) or len(cut) * beginning.endswith(cut)
    if message["content"].rstrip().endswith("</think>"):
        closed = re.compile(r"\s*</think>\s*").match(text, last)
        last += len(closed[0].removesuffix(space_behind(template.tokenizer))) if closed else 0
    end = end_token(ends, text[last:following])
    return first, last, last + (end.end() if end else 0)


def _size_before(beginning: str, written: str) -> int:
    """How many characters of an answer the template has written before its first mark: tags of
    thinking as the answer has them, or in the template's own manner.
    """
    if written.endswith(beginning):
        return len(beginning)
    tag = _THINK_OPEN if "<think>" in beginning else _THINK_CLOSED
    found = tag.search(written)
    return len(written) - found.start() if found else 0


def _left_open(
    template: Template, scaffold: Scaffold, last: int, ends: Sequence[str]
) -> int | None:
    """Where a last answer with calls or thinking ends, whose turn the template leaves open, as the
    header of what follows ends it; None where that is not plain.

    Args:
        last: Behind its last mark.
    """
    behind, message = scaffold.text[last:].rstrip(), scaffold.messages[-1]
    if not behind:
        return last
    ids = [call.get("id") for call in message.get("tool_calls", ())]
    further: list[Message] = [{"role": "tool", "content": "?", "tool_call_id": i} for i in ids]
    further = further or [{"role": "user", "content": "?"}]
    try:
        continued = template.scaffold([*scaffold.messages, *further])
    except ValueError:
        return None
    end = end_token(ends, continued[last:])
    if end is None or continued[:last] != scaffold.text[:last]:
        return None
    closing = continued[last : last + end.start(1)].rstrip()
    return last + len(closing) if closing == behind else None
