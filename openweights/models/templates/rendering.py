"""The one place that renders conversations.

What a template makes of one is compared with what its messages say. What is learned is what they
say, to the letter: where a template only trims white space, the message's own text is put back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from openweights.models.reading import token_ids
from openweights.models.templates.comparison import compared
from openweights.models.templates.control_tokens import refuse_control_tokens
from openweights.models.templates.ends import end_of_call, end_of_turn, end_token
from openweights.models.templates.functions import check_functions
from openweights.models.templates.messages import Message, MessageError, is_structured
from openweights.models.templates.places import INTERWOVEN, place_of
from openweights.models.templates.scaffold import Scaffold, scaffold_of
from openweights.models.templates.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    trimmed: int = 0


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text.

    Attributes:
        spans: Where the wanted messages are, in their order.
        cuts: Characters at which a token must begin, since the model is asked up to there.
        notes: What is worth saying once for a whole dataset.
    """

    text: str
    spans: list[MessageSpan] = field(default_factory=list[MessageSpan])
    cuts: list[int] = field(default_factory=list[int])
    notes: frozenset[str] = frozenset()


def rendered_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    wanted: Collection[int],
    ends: Sequence[str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
) -> Rendered:
    """The conversation as one text, and where the wanted messages are in it.

    Wanted messages of the assistant are learned, and are in the text to the letter; others are
    located. A last answer whose turn the template leaves open is closed with the end token.

    Args:
        wanted: Indices of messages.
        ends: Texts of the tokens that end a turn.
        tools: Schemas of functions that the assistant may call.
        now: The moment, for templates that tell it.

    Raises:
        ConfigError: The tokenizer has no chat template.
        MessageError: What a message says is not what would be learned or read.
        ValueError: The template refuses the conversation.
    """
    refuse_control_tokens(tokenizer, messages, tools)
    template = Template(tokenizer, tools, {}, now or datetime.now())
    notes = check_functions(template, messages)
    if any(message.get("tool_calls") for message in messages):
        ends = [*ends, *filter(None, [end_of_call(tokenizer)])]
    try:
        rendered = _located(template, messages, wanted, ends)
    except MessageError as error:
        answered = _after_prompt(template, messages, wanted, ends)
        if answered is None:
            raise error from None
        rendered = answered
    if notes:
        rendered = replace(rendered, notes=rendered.notes | notes)
    if messages[-1]["role"] == "assistant" and not rendered.text.rstrip().endswith(tuple(ends)):
        end = end_of_call(tokenizer) if messages[-1].get("tool_calls") else None
        end = end or end_of_turn(tokenizer) or str(tokenizer.eos_token)
        return _closed(rendered, end, len(messages) - 1 in wanted)
    return rendered


def _located(
    template: Template, messages: Sequence[Message], wanted: Collection[int], ends: Sequence[str]
) -> Rendered:
    learned = {index for index in wanted if messages[index]["role"] == "assistant"}
    scaffold, text, shown, notes = compared(template, messages, kept=learned)
    places = [
        place_of(template, scaffold, messages, index, index in learned, ends, notes)
        for index in wanted
    ]
    spans: list[MessageSpan] = []
    cuts: list[int] = []
    output, done = "", 0
    for index, place, inserted in sorted(places, key=lambda found: found[1]):
        start, stop, end = (_in_text(scaffold, shown, at) for at in place)
        if start < done:
            raise MessageError(index, INTERWOVEN)
        content, is_plain = messages[index]["content"], not is_structured(messages[index])
        said = text[start:stop]
        if index in learned:
            said = content if is_plain else _to_the_letter(scaffold, shown, *place[:2])
        output += text[done:start]
        span = MessageSpan(
            index,
            start=len(output),
            stop=len(output) + len(said),
            end=len(output) + len(said) + end - stop,
            trimmed=content.find(said) if is_plain else 0,
        )
        spans.append(span)
        # A space that the template writes before each answer is part of the answer's first token.
        cuts += [span.stop] if inserted == " " or index not in learned else [span.start, span.stop]
        output, done = output + said, stop
    return Rendered(output + text[done:], spans, cuts, frozenset(notes))


def _to_the_letter(scaffold: Scaffold, shown: Sequence[str], start: int, stop: int) -> str:
    """A stretch of the scaffold with its texts in their places. White space that the template
    trimmed is put back where the template does not write the same itself, as the line breaks
    around a thought.
    """
    inside = [
        (mark, here)
        for mark, here in zip(scaffold.marks, shown, strict=True)
        if start <= mark.start < stop
    ]
    stops = [*(mark.start for mark, _ in inside[1:]), stop]
    text = scaffold.text[start : inside[0][0].start]
    for (mark, here), following in zip(inside, stops, strict=True):
        said, behind = scaffold.said_by(mark), scaffold.text[mark.stop : following]
        lead, _, tail = said.partition(here)
        before = scaffold.text[:start] + text
        written = next(n for n in range(len(lead), -1, -1) if before.endswith(lead[:n]))
        missing = next(n for n in range(len(tail) + 1) if behind.startswith(tail[n:]))
        text += lead[written:] + here + tail[:missing] + behind
    return text


def _in_text(scaffold: Scaffold, shown: Sequence[str], at: int) -> int:
    """A position of the scaffold, outside of marks, in the text that shows something else there."""
    pairs = zip(scaffold.marks, shown, strict=True)
    return at + sum(len(here) - (m.stop - m.start) for m, here in pairs if m.stop <= at)


def _after_prompt(
    template: Template, messages: Sequence[Message], wanted: Collection[int], ends: Sequence[str]
) -> Rendered | None:
    """A single last answer behind the prompt that the model is asked with.

    That is what it will be at inference, whatever the template makes of an answer that was given:
    some cut the thinking, or read the system text from the last user turn alone.
    """
    last, answer = len(messages) - 1, messages[-1]
    has_more = is_structured(answer) or "name" in answer
    if set(wanted) != {last} or answer["role"] != "assistant" or has_more or not last:
        return None
    try:
        prompt, text, _, notes = compared(template, messages[:-1], prompt=True)
        whole = scaffold_of(template, messages, prompt=False, verbatim={last})
    except ValueError:
        return None
    content, own = answer["content"], whole.marks_of(last)
    opened = re.search(r"<think>\s*\Z", text)
    if len(own) != 1 or (opened and "</think>" not in content):
        return None
    if opened and content.lstrip().startswith("<think>"):
        text = text[: opened.start()]
    header = whole.before(last)
    asked = prompt.text[prompt.marks[-1].stop if prompt.marks else 0 :]
    inserted = header.removeprefix(asked) if header.startswith(asked) else ""
    text += inserted if not inserted.strip() else ""
    closing = whole.text[own[0].stop :]
    end = end_token(ends, closing)
    start, stop = len(text), len(text) + len(content)
    span = MessageSpan(last, start, stop, stop + (end.end() if end else 0))
    cuts = [stop] if inserted == " " else [start, stop]
    return Rendered(text + content + closing, [span], cuts, frozenset(notes))


def _closed(rendered: Rendered, end: str, learned: bool) -> Rendered:
    """With the end token that the template does not write, as the last that is said. Some templates
    write the beginning of a further answer behind it, which nobody has given.
    """
    text, spans = rendered.text, list(rendered.spans)
    if not learned:
        return replace(rendered, text=text + end)
    last = spans[-1]
    text = text[: last.end]
    if last.end == last.stop:
        text += end
    return replace(rendered, text=text, spans=[*spans[:-1], replace(last, end=len(text))])


def rendered_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    verbatim: Collection[int] = (),
    now: datetime | None = None,
    **options: Any,
) -> Rendered:
    """The text that the model continues to answer the conversation.

    Args:
        tools: Schemas of functions that the assistant may call.
        verbatim: Messages that stand in it to the letter, though the template may cut such ones.
        now: The moment, for templates that tell it.
        options: What the template reads beside that.

    Raises:
        ConfigError: The tokenizer has no chat template.
        MessageError: What a message says is not what would be read.
        ValueError: The template refuses the conversation.
    """
    refuse_control_tokens(tokenizer, messages, tools)
    template = Template(tokenizer, tools, options, now or datetime.now())
    on_functions = check_functions(template, messages, prompt=True)
    scaffold, text, _, notes = compared(template, messages, prompt=True, verbatim=verbatim)
    if verbatim:
        text = scaffold.filled(text)
    return Rendered(text, notes=frozenset(notes | on_functions))


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **asked: Any
) -> list[int]:
    """The tokens of `rendered_prompt`."""
    return token_ids(tokenizer, rendered_prompt(tokenizer, messages, **asked).text)
