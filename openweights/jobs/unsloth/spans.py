"""Where the assistant's words are in a rendered conversation.

The template is asked, not parsed: the conversation is rendered twice, once as it is and once with
marks in place of the assistant's messages. What stands around the marks is scaffolding (headers,
other turns, an inserted think block), and what stands between is what the assistant says. A
template that treats a marked message differently is noticed, because the scaffolding no longer
fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]
Span = tuple[int, int]

_MARK = "ASSISTANT-SPAN-{index}-MARK"


def assistant_spans(
    messages: Sequence[Message], render: Render, ends: Sequence[str]
) -> tuple[str, list[Span]]:
    """The rendered conversation, and the character span of each assistant message in it.

    A span holds the message and the end token that closes its turn, where the template writes one.

    Args:
        render: Applies the chat template.
        ends: Texts of the tokens that end a turn.

    Raises:
        ValueError: The template changes assistant messages in a way that hides where they are.
    """
    text = render(messages)
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marks = {index: _MARK.format(index=index) for index in said}
    marked = [
        {**message, "content": marks.get(index, message["content"])}
        for index, message in enumerate(messages)
    ]
    scaffolds = _split(render(marked), [marks[index] for index in said])
    spans: list[Span] = []
    position = _after(text, 0, scaffolds[0])
    for index, scaffold in zip(said, scaffolds[1:], strict=True):
        start = position
        stop = _after(text, start, _shown(text, start, messages[index]["content"], scaffold))
        spans.append((start, stop + _closing(scaffold, ends)))
        position = _after(text, stop, scaffold)
    if position != len(text):
        raise ValueError(_HIDDEN)
    return text, spans


_HIDDEN = (
    "the chat template rewrites assistant messages, so it cannot be told which tokens are the "
    "answer; give a chat_template that keeps them as they are, or set "
    "train_on_responses_only=False"
)


def _split(marked: str, marks: Sequence[str]) -> list[str]:
    pieces, rest = [], marked
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(_HIDDEN)
        pieces.append(before)
    if any(mark in piece for mark in marks for piece in [*pieces, rest]):
        raise ValueError(_HIDDEN)
    return [*pieces, rest]


def _shown(text: str, start: int, content: str, scaffold: str) -> str:
    """The message as the template wrote it: whole, or with white space trimmed."""
    for shown in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.startswith(shown + scaffold, start):
            return shown
    raise ValueError(_HIDDEN)


def _after(text: str, position: int, piece: str) -> int:
    if not text.startswith(piece, position):
        raise ValueError(_HIDDEN)
    return position + len(piece)


def _closing(scaffold: str, ends: Sequence[str]) -> int:
    """Characters of `scaffold` up to and with the end token that closes the turn; 0 without one."""
    choices = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True) if end)
    match = re.match(rf"\s*(?:{choices})", scaffold) if choices else None
    return match.end() if match else 0
