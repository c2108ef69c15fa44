"""The one place that renders conversations, and finds messages in what was rendered.

The template is asked, not parsed: the conversation is rendered twice, once as it is and once with
marks in place of some messages. What stands around the marks is scaffolding (headers, other turns,
an inserted think block), and what stands between is what those messages say. A template that treats
a marked message differently is noticed, because the scaffolding no longer fits. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def flat_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """A message's content as one string, whether it is one or a list of text blocks."""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


Render = Callable[[Sequence[Message]], str]


_MARK = "MESSAGE-SPAN-{index}-MARK"


@dataclass(frozen=True, slots=True)
class MessageSpan:
    """Characters of one message in a rendered conversation.

    Attributes:
        message: Its index.
        start, stop: Its text.
        end: Behind the end token that closes its turn; `stop` where the template writes none.
        trimmed: So many characters of its content the template has cut off on the left.
    """

    message: int
    start: int
    stop: int
    end: int
    trimmed: int


def assistant_messages(messages: Sequence[Message]) -> list[int]:
    """The indices of what the assistant says."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def message_spans(
    messages: Sequence[Message], wanted: Collection[int], render: Render, ends: Sequence[str]
) -> tuple[str, list[MessageSpan]]:
    """The rendered conversation, and where the wanted messages are in it, in their order.

    Args:
        wanted: Indices of messages.
        render: Applies the chat template.
        ends: Texts of the tokens that end a turn.

    Raises:
        ValueError: The template changes messages in a way that hides where they are.
    """
    text = render(messages)
    marks = {index: _MARK.format(index=index) for index in sorted(wanted)}
    marked = [
        {**message, "content": marks.get(index, message["content"])}
        for index, message in enumerate(messages)
    ]
    scaffolds = _split(render(marked), list(marks.values()))
    spans: list[MessageSpan] = []
    position = _after(text, 0, scaffolds[0])
    for index, scaffold in zip(marks, scaffolds[1:], strict=True):
        content = messages[index]["content"]
        shown = _shown(text, position, content, scaffold)
        stop = position + len(shown)
        trimmed = content.find(shown)
        spans.append(MessageSpan(index, position, stop, stop + _closing(scaffold, ends), trimmed))
        position = _after(text, stop, scaffold)
    if position != len(text):
        raise ValueError(_HIDDEN)
    return text, spans


_HIDDEN = (
    "the chat template rewrites messages, so it cannot be told which tokens are the answer; give a "
    "chat_template that keeps them as they are, or set train_on_responses_only=False"
)


def _split(marked: str, marks: Sequence[str]) -> list[str]:
    pieces: list[str] = []
    rest = marked
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


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **options: Any,
) -> str:
    """The conversation as one text.

    Args:
        options: What the template reads beside the messages.

    Raises:
        ConfigError: The tokenizer has no chat template.
        ValueError: The template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "chat_template: the model's tokenizer has none; give one, or choose an instruct model"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it ({error}); correct the messages") from None
    assert isinstance(text, str)
    return text


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any
) -> list[int]:
    """What the model continues to answer the conversation; `options` as of `render_chat`."""
    text = render_chat(tokenizer, messages, add_generation_prompt=True, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered_spans(
    messages: Sequence[Message],
    wanted: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[str],
) -> tuple[str, list[MessageSpan]]:
    """The conversation as one text, and where the wanted messages are in it.

    A last assistant message whose turn the template leaves open is closed with the end token.

    Raises:
        ValueError: See `message_spans`.
    """
    text, spans = message_spans(messages, wanted, lambda m: render_chat(tokenizer, m), ends)
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(tuple(ends)):
        end = str(tokenizer.eos_token)
        if len(messages) - 1 in wanted:
            text = text[: spans[-1].end]
            spans[-1] = replace(spans[-1], end=len(text) + len(end))
        text += end
    return text, spans
