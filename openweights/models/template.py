"""The one place that renders conversations, and compares what was rendered with what was said.

What a template makes of a conversation is found out in `scaffold.py`: a text that is dropped,
repeated, rewritten, or read elsewhere than when the model is asked, is refused with the message's
place. What is learned is what the message says, to the letter: where a template only trims white
space, the message's own text is put back. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import ConfigError
from openweights.json_values import texts_of
from openweights.models.functions import check_functions
from openweights.models.names import location_here
from openweights.models.reading import token_ids, without_weights
from openweights.models.scaffold import (
    Message,
    MessageError,
    Scaffold,
    Template,
    compared,
    is_structured,
    scaffold_of,
    unmarked_beginning,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


# ---- what is learned -----------------------------------------------------------------------------


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
        _found(template, scaffold, messages, index, index in learned, ends, notes)
        for index in wanted
    ]
    spans: list[MessageSpan] = []
    cuts: list[int] = []
    output, done = "", 0
    for index, place, inserted in sorted(places, key=lambda found: found[1]):
        start, stop, end = (_in_text(scaffold, shown, at) for at in place)
        if start < done:
            raise MessageError(index, _INTERWOVEN)
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


_INTERWOVEN = (
    ": the chat template writes other messages amid this one, such as what a function returned "
    "between a call and the text beside it; give the call and the text messages of their own, or "
    "another chat_template"
)


def _found(
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
        raise MessageError(index, _INTERWOVEN)
    following = next((mark.start for mark in scaffold.marks if mark.start >= last), len(text))
    if is_structured(message):
        end = _end_token(ends, text[last:following])
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
    first -= _size_before(beginning, text[begun:first])
    if message["content"].rstrip().endswith("</think>"):
        closed = re.compile(r"\s*</think>\s*").match(text, last)
        last = closed.end() if closed else last
    end = _end_token(ends, text[last:following])
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
    end = _end_token(ends, continued[last:])
    if end is None or continued[:last] != scaffold.text[:last]:
        return None
    closing = continued[last : last + end.start(1)].rstrip()
    return last + len(closing) if closing == behind else None


def _end_token(ends: Sequence[str], behind: str) -> re.Match[str] | None:
    """The first end token behind an answer, as group 1. What the template writes before it, such as
    a closing tag, is said with the answer, too.
    """
    choices = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True) if end)
    return re.compile(f".*?({choices})", re.DOTALL).match(behind) if choices else None


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
    header = _before(whole, last)
    asked = prompt.text[prompt.marks[-1].stop if prompt.marks else 0 :]
    inserted = header.removeprefix(asked) if header.startswith(asked) else ""
    text += inserted if not inserted.strip() else ""
    closing = whole.text[own[0].stop :]
    end = _end_token(ends, closing)
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


# ---- what is read --------------------------------------------------------------------------------


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


# ---- the vocabulary's own tokens -----------------------------------------------------------------


def refuse_control_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """See that no message or tool holds a control token, which would be read as one, not as text.

    Raises:
        MessageError: A message does.
        ValueError: A tool does.
    """
    pattern = _control_tokens(tokenizer, str(tokenizer.chat_template))
    for index, message in enumerate(messages):
        if found := _control_token(message, pattern):
            raise MessageError(index, _HOLDS.format(place=found[0], token=found[1]))
    for index, tool in enumerate(tools or ()):
        if found := _control_token(tool, pattern):
            raise ValueError(f"tools[{index}]{_HOLDS.format(place=found[0], token=found[1])}")


_HOLDS = (
    "{place}: holds {token!r}, a control token of the model, which would not be read as text; "
    "remove it, or write it in another way"
)


def _control_token(value: Any, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Where in a value the first control token is, and which."""
    for place, text in texts_of(value):
        if match := pattern.search(text):
            return f".{place}", match[0]
    return None


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Special tokens, and those of the vocabulary that the template writes around each turn."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    tokens = special | {str(token) for token in added if not token.special} & _around(tokenizer)
    tokens -= {"<think>", "</think>"}
    choices = "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True) if t.strip())
    return re.compile(choices or r"(?!)")


def _around(tokenizer: Any) -> set[str]:
    """Tokens of the vocabulary that the template writes around questions and answers, or with which
    a turn of another role begins.
    """
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    text = exchange_text(tokenizer)
    found = {token for token in added if token in text}
    closing = {tokenizer.bos_token, tokenizer.eos_token, end_of_turn(tokenizer)}
    for role in ("system", "developer", "tool"):
        for before in ((), ("user", "assistant")):
            scaffold = _scaffold_of_roles(tokenizer, *before, role, "user", "assistant")
            header = _before(scaffold, len(before)) if scaffold else ""
            tokens = re.findall("|".join(map(re.escape, added)) or r"(?!)", header)
            found.update([token for token in tokens if token not in closing][:1])
    return found


def _before(scaffold: Scaffold, message: int) -> str:
    """What stands between a message and the one before it."""
    own = scaffold.marks_of(message)
    if not own:
        return ""
    before = [mark.stop for mark in scaffold.marks if mark.start < own[0].start]
    return scaffold.text[max(before, default=0) : own[0].start]


def _scaffold_of_roles(tokenizer: Any, *roles: str) -> Scaffold | None:
    """A scaffold of a text by each role; None where the template refuses that, or there is none."""
    messages: list[Message] = [{"role": role, "content": "?"} for role in roles]
    try:
        return scaffold_of(Template(tokenizer, None, {}), messages, prompt=False, verbatim=())
    except ValueError:
        return None


def exchange_text(tokenizer: Any) -> str:
    """A question and its answer as the template writes them; empty where it refuses them."""
    scaffold = _scaffold_of_roles(tokenizer, "user", "assistant")
    return scaffold.marking.hidden(scaffold.text) if scaffold else ""


def end_of_turn(tokenizer: Any) -> str | None:
    """The token that the template writes behind an answer; None where it writes none."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    for turns in (1, 2):  # some leave the last turn open
        scaffold = _scaffold_of_roles(tokenizer, *("user", "assistant") * turns)
        if scaffold is None or len(scaffold.marks) != 2 * turns:
            continue
        stops = [*(mark.start for mark in scaffold.marks), len(scaffold.text)]
        behind = scaffold.text[scaffold.marks[1].stop : stops[2]]
        # Behind other text it may be the beginning of the next turn.
        opening = scaffold.text[: stops[0]]
        later = [
            token for token in added if token not in opening or behind.lstrip().startswith(token)
        ]
        token = _end_token(later, behind)
        if token and token[1] != tokenizer.bos_token:
            return token[1]
    return None


_ARGUMENT = "leafofthetree"


def end_of_call(tokenizer: Any) -> str | None:
    """The token with which an answer hands over to the function that it calls; None where that is
    what ends other answers, too, or the template writes no calls.
    """
    return _end_of_call(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _end_of_call(tokenizer: Any, template: str) -> str | None:
    del template  # which `tokenizer` has; another one is another answer
    one, two = (_scaffold_of_calls(tokenizer, number) for number in (1, 2))
    if one is None or not (own := one.marks_of(1)):
        return None
    following = next((m.start for m in one.marks if m.start > own[0].start), len(one.text))
    at = one.text.rfind(_ARGUMENT, own[0].stop, following)
    if at < 0:
        return None
    behind, between = one.text[at:following], _between_calls(two)
    if any(end and end in behind for end in (tokenizer.eos_token, end_of_turn(tokenizer))):
        return None
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    tokens = re.findall("|".join(map(re.escape, added)) or r"(?!)", behind)
    return next((token for token in tokens if token not in between), None)


def _scaffold_of_calls(tokenizer: Any, number: int) -> Scaffold | None:
    """A scaffold of so many calls in one answer, and of what they returned."""
    ids = [f"call0000{index}" for index in range(number)]
    function = {"name": "leaf", "arguments": {"leaf": _ARGUMENT}}
    calls = [{"type": "function", "id": given, "function": function} for given in ids]
    messages: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "?", "tool_call_id": given} for given in ids),
    ]
    try:
        return scaffold_of(Template(tokenizer, None, {}), messages, prompt=False, verbatim=())
    except ValueError:
        return None


def _between_calls(scaffold: Scaffold | None) -> str:
    """What closes a call that another one follows."""
    own = scaffold.marks_of(1) if scaffold else []
    if scaffold is None or len(own) < 2:
        return ""
    at = scaffold.text.rfind(_ARGUMENT, own[0].stop, own[1].start)
    return scaffold.text[at : own[1].start] if at >= 0 else ""


# ---- options -------------------------------------------------------------------------------------


def set_template(tokenizer: Any, chat_template: str, options: Mapping[str, Any]) -> None:
    """Give the tokenizer a chat template with its options written into it.

    So they hold wherever the tokenizer renders: in training, sampling, measuring, and after the
    result was saved, unless a caller gives others.

    Args:
        chat_template: Jinja, or "default" for the tokenizer's own.

    Raises:
        ConfigError: The template reads no such option.
    """
    if chat_template != "default":
        tokenizer.chat_template = chat_template
    if not options:
        return
    given: Any = tokenizer.chat_template or ""
    has_names = isinstance(given, dict)  # some models have templates for several uses
    named = cast("dict[str, str]", given if has_names else {"": given})
    for option in options:
        if not any(re.search(rf"\b{re.escape(option)}\b", text) for text in named.values()):
            raise ConfigError(
                f"template_options: the chat template reads no {option!r}; correct its name, or "
                "remove it"
            )
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
        for name, value in options.items()
    ]
    written = {name: "".join(lines) + text for name, text in named.items()}
    tokenizer.chat_template = written if has_names else written[""]


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value)
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in pairs.items()) + "}"
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return "[" + ", ".join(map(_literal, items)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def tokenizer_at_hand(location: str) -> Any | None:
    """A model's tokenizer, if it is on this machine, and so is what reads it; None otherwise.

    It knows which of its tokens the model's weights lack.
    """
    if find_spec("transformers") is None or not is_at_hand(location):
        return None
    location = location_here(location)
    try:
        from transformers import AutoTokenizer

        loader: Any = AutoTokenizer
        # Nobody is asked about a repository's own code.
        given = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = loader.from_pretrained(location, **given)
        if rows := _embedding_rows(location):
            without_weights(tokenizer, rows)
        return tokenizer
    except (OSError, ValueError):
        return None


def is_at_hand(location: str) -> bool:
    """Whether a model's tokenizer may be on this machine; it need not be readable."""
    try:
        return _file_at_hand(location_here(location), "tokenizer_config.json") is not None
    except (OSError, ValueError):
        return False


def _file_at_hand(location: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository where that was fetched before."""
    if Path(location).is_dir():
        return Path(location) / name
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(location, name)
    return Path(found) if isinstance(found, str) else None


def _embedding_rows(location: str) -> int | None:
    """How many tokens a model's weights have; None where its folder does not say."""
    file = _file_at_hand(location, "config.json")
    if file is None or not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return rows if isinstance(rows, int) else None
