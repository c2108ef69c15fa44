"""The one place that renders conversations, and compares what was rendered with what was said.

The template is asked, not parsed: a conversation is rendered twice, once as it is and once with
marks in place of its texts. The marked one, the *scaffold*, shows what the template makes of such a
conversation: headers, ends of turns, an inserted think block, and where each text goes. The other
must be the scaffold with the texts in their places; a text that is dropped, repeated, rewritten, or
read elsewhere than when the model is asked, is refused with the message's place.

What is learned is what the message says, to the letter: where a template only trims white space,
the message's own text is put back. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from importlib.util import find_spec
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_MARK = "MARK-{index}-{part}-KRAM"
_MARKS = re.compile(r"MARK-(\d+)-([A-Z]+)-KRAM")
# An answer with thinking: the opening tag, which a generation prompt may have written already,
# the thinking, the closing tag, the rest.
_THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_THINK_OPEN = re.compile(r"<think>\s*(?:</think>\s*)?\Z")

TRIMMED = "the chat template trims white space at the ends of what is read"
FORGOTTEN = "the chat template leaves out the thinking of earlier answers, as it does when sampling"
INSERTED = (
    "before an answer the chat template writes {text}, which is not in the prompt that is sampled "
    "from; see template_options"
)
DIFFERS = (
    "the prompt that is sampled from ends with {text}, which the chat template does not write "
    "before an answer that is given; see template_options"
)


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
    spans: list[MessageSpan] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    notes: frozenset[str] = frozenset()


def flat_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """A message's content as one string, whether it is one or a list of text blocks."""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def assistant_messages(messages: Sequence[Message]) -> list[int]:
    """The indices of what the assistant says."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


# ---- asking the template -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Template:
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
    return _Template(tokenizer, tools, options).render(marked, prompt=prompt)


@dataclass(frozen=True, slots=True)
class _Scaffold:
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


def _scaffold(
    template: _Template, messages: Sequence[Message], *, prompt: bool, verbatim: Collection[int]
) -> _Scaffold:
    said: dict[str, str] = {}
    marked = [
        _marked(index, message, said, whole=index in verbatim)
        for index, message in enumerate(messages)
    ]
    text = template.scaffold(marked, prompt=prompt)
    return _Scaffold(marked, said, text, list(_MARKS.finditer(text)))


def _marked(index: int, message: Message, said: dict[str, str], *, whole: bool) -> Message:
    """The message with marks in place of its texts; `said` is told what they stand for."""

    def mark(part: str, text: str) -> str:
        name = _MARK.format(index=index, part=part)
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


def _compared(
    template: _Template,
    messages: Sequence[Message],
    *,
    kept: Collection[int] = (),
    prompt: bool = False,
    verbatim: Collection[int] = (),
) -> tuple[_Scaffold, str, list[str], set[str]]:
    """Scaffold, rendered text, what the text shows in place of each mark, and notes.

    Args:
        kept: Messages that are learned.
        verbatim: Messages whose mark stays in the text.

    Raises:
        MessageError: Something is lost.
    """
    scaffold = _scaffold(template, messages, prompt=prompt, verbatim=verbatim)
    notes = _missing(scaffold, messages, kept)
    _check_tools(template, scaffold, prompt=prompt)
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


def _missing(scaffold: _Scaffold, messages: Sequence[Message], kept: Collection[int]) -> set[str]:
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
        raise MessageError(number, _dropped(messages[number], part, is_last=is_last))
    return notes


_REWRITTEN = (
    "the chat template rewrites messages, so that what is learned would not be what the row says; "
    "give a chat_template that keeps them as they are"
)


def _dropped(message: Message, part: str, *, is_last: bool) -> str:
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


def _check_tools(template: _Template, scaffold: _Scaffold, *, prompt: bool) -> None:
    """See that tools and the arguments of calls change what is rendered."""
    if template.tools:
        without = replace(template, tools=None).scaffold(scaffold.messages, prompt=prompt)
        if without == scaffold.text:
            raise ValueError(
                "tools: the chat template does not write them; describe them in the system "
                "message, or give a chat_template that does"
            )
    for index, message in enumerate(scaffold.messages):
        calls = message.get("tool_calls") or []
        if not any(call["function"].get("arguments") for call in calls):
            continue
        empty = [{**c, "function": {**c["function"], "arguments": {}}} for c in calls]
        bare = [*scaffold.messages]
        bare[index] = {**message, "tool_calls": empty}
        if template.scaffold(bare, prompt=prompt) == scaffold.text:
            raise MessageError(index, _dropped(message, "CALL", is_last=False))


def _walk(scaffold: _Scaffold, said: Mapping[str, str], text: str) -> Iterator[str]:
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


# ---- what is learned -----------------------------------------------------------------------------


def rendered_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    wanted: Collection[int],
    ends: Sequence[str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """The conversation as one text, and where the wanted messages are in it.

    Wanted messages of the assistant are learned, and are in the text to the letter; others are
    located. A last answer whose turn the template leaves open is closed with the end token.

    Args:
        wanted: Indices of messages.
        ends: Texts of the tokens that end a turn.
        tools: Schemas of functions that the assistant may call.

    Raises:
        ConfigError: The tokenizer has no chat template.
        MessageError: What a message says is not what would be learned or read.
        ValueError: The template refuses the conversation.
    """
    refuse_control_tokens(tokenizer, messages)
    template = _Template(tokenizer, tools, {})
    try:
        rendered = _located(template, messages, wanted, ends)
    except MessageError as error:
        answered = _after_prompt(template, messages, wanted, ends)
        if answered is None:
            raise error from None
        rendered = answered
    if messages[-1]["role"] == "assistant" and not rendered.text.rstrip().endswith(tuple(ends)):
        return _closed(rendered, str(tokenizer.eos_token), len(messages) - 1 in wanted)
    return rendered


def _located(
    template: _Template, messages: Sequence[Message], wanted: Collection[int], ends: Sequence[str]
) -> Rendered:
    learned = {index for index in wanted if messages[index]["role"] == "assistant"}
    scaffold, text, shown, notes = _compared(template, messages, kept=learned)
    spans: list[MessageSpan] = []
    cuts: list[int] = []
    output, done = "", 0
    for index in sorted(wanted):
        prompt = _prompt_before(template, scaffold, index) if index in learned else None
        agrees = prompt is not None and scaffold.text.startswith(prompt)
        asked = len(prompt) if prompt and agrees else None
        place = _place(scaffold, messages, index, asked, ends)
        inserted = "" if asked is None else scaffold.text[asked : place[0]]
        if inserted.strip():
            notes.add(INSERTED.format(text=repr(inserted)))
        elif prompt and not agrees:
            notes.add(DIFFERS.format(text=repr(prompt[_common(prompt, scaffold.text) :])))
        start, stop, end = (_in_text(scaffold, shown, at) for at in place)
        content, is_plain = messages[index]["content"], not _is_structured(messages[index])
        said = content if is_plain and index in learned else text[start:stop]
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


def _common(first: str, second: str) -> int:
    return len(commonprefix([first, second]))


def _is_structured(message: Message) -> bool:
    """Whether the template writes more of the message than its content."""
    return bool(message.get("reasoning_content") or message.get("tool_calls"))


def _prompt_before(template: _Template, scaffold: _Scaffold, index: int) -> str | None:
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
    first = own[0].start() if own else len(scaffold.text)
    before = [mark[0] for mark in scaffold.marks if int(mark[1]) < index or mark.start() < first]
    if before != [mark[0] for mark in _MARKS.finditer(prompt)]:
        raise MessageError(
            index,
            ": the chat template puts other texts before it here than when the model is asked for "
            "it; set train_on='last', or give each answer a row of its own",
        )
    return prompt


def _place(
    scaffold: _Scaffold,
    messages: Sequence[Message],
    index: int,
    asked: int | None,
    ends: Sequence[str],
) -> tuple[int, int, int]:
    """Start and stop of a message in the scaffold, and where the end token behind it ends."""
    own, message, text = scaffold.marks_of(index), messages[index], scaffold.text
    first = own[0].start() if own else (asked or 0)
    last = own[-1].end() if own else first
    following = next((m.start() for m in scaffold.marks if m.start() >= last), len(text))
    if _is_structured(message):
        end = _end_token(ends, "(?:.*?)", text[last:following])
        if asked is None or asked > first or end is None:
            raise MessageError(
                index,
                ": the chat template hides where this answer with calls or thinking begins or "
                "ends; write it as one content, or give another chat_template",
            )
        return asked, last + end.start(1), last + end.end()
    if "<think>" in message["content"] and (opened := _THINK_OPEN.search(text, 0, first)):
        first = opened.start()
    if message["content"].rstrip().endswith("</think>"):
        closed = re.compile(r"\s*</think>\s*").match(text, last)
        last = closed.end() if closed else last
    end = _end_token(ends, r"\s*", text[last:following])
    return first, last, last + (end.end() if end else 0)


def _end_token(ends: Sequence[str], before: str, text: str) -> re.Match[str] | None:
    """The end token that closes a turn, as group 1."""
    choices = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True) if end)
    return re.compile(f"{before}({choices})", re.DOTALL).match(text) if choices else None


def _in_text(scaffold: _Scaffold, shown: Sequence[str], at: int) -> int:
    """A position of the scaffold, outside of marks, in the text that shows something else there."""
    pairs = zip(scaffold.marks, shown, strict=True)
    return at + sum(len(here) - len(mark[0]) for mark, here in pairs if mark.end() <= at)


def _after_prompt(
    template: _Template, messages: Sequence[Message], wanted: Collection[int], ends: Sequence[str]
) -> Rendered | None:
    """A single last answer behind the prompt that the model is asked with.

    That is what it will be at inference, whatever the template makes of an answer that was given:
    some cut the thinking, or read the system text from the last user turn alone.
    """
    last, answer = len(messages) - 1, messages[-1]
    if set(wanted) != {last} or answer["role"] != "assistant" or _is_structured(answer) or not last:
        return None
    try:
        prompt, text, _, notes = _compared(template, messages[:-1], prompt=True)
        whole = _scaffold(template, messages, prompt=False, verbatim={last})
    except ValueError:
        return None
    content, own = answer["content"], whole.marks_of(last)
    opened = re.search(r"<think>\s*\Z", text)
    if len(own) != 1 or (opened and "</think>" not in content):
        return None
    if opened and content.lstrip().startswith("<think>"):
        text = text[: opened.start()]
    header = whole.text[: own[0].start()].rpartition("-KRAM")[2]
    asked = prompt.text.rpartition("-KRAM")[2]
    inserted = header.removeprefix(asked) if header.startswith(asked) else ""
    text += inserted if not inserted.strip() else ""
    closing = whole.text[own[0].end() :]
    end = _end_token(ends, r"\s*", closing)
    start, stop = len(text), len(text) + len(content)
    span = MessageSpan(last, start, stop, stop + (end.end() if end else 0))
    cuts = [stop] if inserted == " " else [start, stop]
    return Rendered(text + content + closing, [span], cuts, frozenset(notes))


def _closed(rendered: Rendered, end: str, learned: bool) -> Rendered:
    """With the end token that the template does not write."""
    text, spans = rendered.text, list(rendered.spans)
    if learned:
        text = text[: spans[-1].end]
        spans[-1] = replace(spans[-1], end=len(text) + len(end))
    return replace(rendered, text=text + end, spans=spans)


# ---- what is read --------------------------------------------------------------------------------


def rendered_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    verbatim: Collection[int] = (),
    **options: Any,
) -> Rendered:
    """The text that the model continues to answer the conversation.

    Args:
        tools: Schemas of functions that the assistant may call.
        verbatim: Messages that stand in it to the letter, though the template may cut such ones.
        options: What the template reads beside that.

    Raises:
        ConfigError: The tokenizer has no chat template.
        MessageError: What a message says is not what would be read.
        ValueError: The template refuses the conversation.
    """
    refuse_control_tokens(tokenizer, messages)
    template = _Template(tokenizer, tools, options)
    scaffold, text, _, notes = _compared(template, messages, prompt=True, verbatim=verbatim)
    if verbatim:
        text = _MARKS.sub(lambda mark: scaffold.said.get(mark[0], mark[0]), text)
    return Rendered(text, notes=frozenset(notes))


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **asked: Any
) -> list[int]:
    """The tokens of `rendered_prompt`."""
    text = rendered_prompt(tokenizer, messages, **asked).text
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- the vocabulary's own tokens -----------------------------------------------------------------


def refuse_control_tokens(tokenizer: Any, messages: Sequence[Message]) -> None:
    """See that no message holds a control token, which would be read as one, not as text.

    Raises:
        MessageError: One does.
    """
    pattern = _control_tokens(tokenizer, str(tokenizer.chat_template))
    for index, message in enumerate(messages):
        for key, value in message.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if match := pattern.search(text):
                raise MessageError(
                    index,
                    f".{key}: holds {match[0]!r}, a control token of the model, which would not be "
                    "read as text; remove it, or write it in another way",
                )


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Special tokens, and those of the vocabulary that the template writes around each turn."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    around = _MARKS.sub("", _exchange(tokenizer)) if template else ""
    tokens = special | {str(token) for token in added if str(token) in around}
    tokens -= {"<think>", "</think>"}
    choices = "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True) if t.strip())
    return re.compile(choices or r"(?!)")


def _exchange(tokenizer: Any, *, turns: int = 2) -> str:
    """A question, its answer, and `turns - 2` more, as a scaffold; empty where it is refused."""
    roles = ("user", "assistant", "user", "assistant")[:turns]
    messages = [{"role": role, "content": "?"} for role in roles]
    try:
        return _scaffold(_Template(tokenizer, None, {}), messages, prompt=False, verbatim=()).text
    except ValueError:
        return ""


def end_of_turn(tokenizer: Any) -> str | None:
    """The token that the template writes behind an answer; None where it writes none."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    for turns in (2, 4):  # some leave the last turn open
        _, _, behind = _exchange(tokenizer, turns=turns).partition(
            _MARK.format(index=1, part="TEXT")
        )
        token = _end_token(added, r"\s*", behind)
        if token and token[1] != tokenizer.bos_token:
            return token[1]
    return None


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
    named: dict[str, str] = dict(given) if isinstance(given, Mapping) else {"": str(given)}
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
    tokenizer.chat_template = written if isinstance(given, Mapping) else written[""]


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        pairs: Mapping[str, Any] = value
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in pairs.items()) + "}"
    if isinstance(value, list):
        items: list[Any] = value
        return "[" + ", ".join(map(_literal, items)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def tokenizer_at_hand(location: str) -> Any | None:
    """A model's tokenizer, if it is on this machine, and so is what reads it; None otherwise."""
    if find_spec("transformers") is None:
        return None
    if not Path(location).is_dir():
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(location, "tokenizer_config.json"), str):
            return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, local_files_only=True)
    except (OSError, ValueError):
        return None
