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
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from openweights.errors import ConfigError

Message = dict[str, Any]

# An answer with thinking: the opening tag, which a generation prompt may have written already,
# the thinking, the closing tag, the rest.
_THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)

_THINKING = ("THOUGHT", "REASONING")

TRIMMED = (
    "the chat template, or a token that it writes, trims white space at the ends of what is read"
)
UNWRITTEN_NAMES = "the chat template does not write the names on what functions returned"
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


# ---- marks ---------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """What stands for a text of a message in a scaffold.

    Attributes:
        message: Index of the message.
        part: Which of its texts.
        start, stop: The mark's place in the scaffold.
    """

    message: int
    part: str
    start: int
    stop: int

    @property
    def key(self) -> tuple[int, str]:
        return self.message, self.part


class Marking(NamedTuple):
    """How marks are written: in letters, figures and dashes, which no template trims or escapes.

    Attributes:
        word: What they begin with; the row, the template and its options hold no such.
    """

    word: str = "MARK"

    @classmethod
    def all(cls) -> Iterator[Marking]:
        """Those to choose from."""
        yield cls()
        yield from (cls(f"MARK{number}") for number in count(1))

    def is_unique(self, shape: Shape, said: Collection[str]) -> bool:
        """Whether the only marks are those of texts that are said, and these hold none."""
        begin = f"{self.word}-"
        if begin in shape.template or any(begin in text for text in said):
            return False
        return shape.asked.count(begin) == sum(map(bool, said))

    def written(self, message: int, part: str) -> str:
        """A mark."""
        return f"{self.word}-{message}-{part}-KRAM"

    def found(self, text: str) -> tuple[Mark, ...]:
        """The marks in a text."""
        return _found(self.word, text)

    def hidden(self, text: str) -> str:
        """A text of a scaffold as a user may see it."""
        return _pattern(self.word).sub("…", text)


@lru_cache(maxsize=16)
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"{word}-(\d+)-([A-Z]+)-KRAM")


@lru_cache(maxsize=2048)
def _found(word: str, text: str) -> tuple[Mark, ...]:
    found = _pattern(word).finditer(text)
    return tuple(Mark(int(mark[1]), mark[2], *mark.span()) for mark in found)


# ---- rendering -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Template:
    """A tokenizer's template, with the tools and options of one conversation.

    Attributes:
        now: The moment that all renderings of the conversation tell, where the template asks.
    """

    tokenizer: Any  # transformers annotates its tokenizers in part only
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]
    now: datetime = field(default_factory=datetime.now)

    @property
    def text(self) -> str:
        return str(self.tokenizer.chat_template or "")

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text that the tokenizer reads: without the white space that its tokens swallow.

        Raises:
            ConfigError: The tokenizer has no chat template.
            ValueError: The template refuses the conversation.
        """
        key, as_text = _thinking_key(self.text), False
        if any(message.get("tool_calls") for message in messages):
            as_text = _takes_text(self.tokenizer, self.text)
        text = self.applied([_as_read(m, key, as_text) for m in messages], prompt=prompt)
        swallowed = _swallowed(self.tokenizer)
        return swallowed.sub("", text) if swallowed else text

    def applied(self, messages: list[Message], *, prompt: bool) -> str:
        """What the template makes of messages as they are."""
        from jinja2 import TemplateSyntaxError

        if not self.tokenizer.chat_template:
            raise ConfigError(
                "chat_template: the model's tokenizer has none; give one, or choose an instruct "
                "model"
            )
        clock = {"strftime_now": self.now.strftime} if "strftime_now" in self.text else {}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                tools=self.tools or None,
                add_generation_prompt=prompt,
                **clock,
                **self.options,
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is no Jinja (line {error.lineno}: {error}); correct it"
            ) from None
        except Exception as error:  # noqa: BLE001 - a template is a program that others wrote
            raise ValueError(
                f"the chat template refuses it ({_words(error)}); correct the messages"
            ) from None

    def scaffold(self, marked: Sequence[Message], *, prompt: bool = False) -> str:
        """`render` of marked messages, which are the same for all conversations of one shape."""
        return _rendered_once(self.shape(marked, prompt=prompt))

    def shape(self, marked: Sequence[Message], *, prompt: bool = False) -> Shape:
        """All that decides what is rendered."""
        asked = json.dumps([marked, self.tools, self.options, prompt])
        return Shape(self.tokenizer, self.text, self._moment(), asked, self.now)

    def _moment(self) -> str:
        """The time, as exactly as the template can tell it."""
        formats = _time_formats(self.text)
        if formats is None:
            return self.now.isoformat()
        return "\n".join(map(self.now.strftime, formats))


def _as_read(message: Message, thinking: str, as_text: bool) -> Message:
    """A message as a template reads it.

    Args:
        thinking: The key of its thinking.
        as_text: Whether arguments of calls are a text of JSON.
    """
    read = dict(message)
    if "reasoning_content" in read:
        read[thinking] = read.pop("reasoning_content")
    if as_text and "tool_calls" in read:
        read["tool_calls"] = [
            {**call, "function": {**function, "arguments": _json(function["arguments"])}}
            for call in read["tool_calls"]
            for function in [call["function"]]
        ]
    return read


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@lru_cache(maxsize=64)
def _thinking_key(template: str) -> str:
    """Under which key a template reads the thinking of an answer."""
    keys = ("reasoning_content", "thinking", "reasoning")
    read = (key for key in keys if re.search(rf"[.'\"]{key}\b", template))
    return next(read, keys[0])


@lru_cache(maxsize=16)
def _takes_text(tokenizer: Any, template: str) -> bool:
    """Whether a template wants arguments of calls as a text of JSON, as OpenAI's format has them.

    Most take an object and write it as JSON. Some fail then, or write it in Python's notation.
    """
    del template  # which `tokenizer` has; another one is another answer
    object_, as_python, as_json = {"Leaf": "Tree"}, "{'Leaf': 'Tree'}", '{"Leaf": "Tree"}'

    def written(arguments: Any) -> str:
        function = {"name": "leaf", "arguments": arguments}
        call = {"type": "function", "id": "call00001", "function": function}
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return Template(tokenizer, None, {}).applied(messages, prompt=False)
        except ValueError:
            return as_python

    return as_python in written(object_) and as_json in written(as_json)


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how marked messages are rendered; equal ones are rendered once.

    Attributes:
        moment: The time as exactly as the template tells it.
        asked: Marked messages, tools, options, and whether an answer is asked for, as JSON.
    """

    tokenizer: Any
    template: str
    moment: str
    asked: str
    now: datetime = field(compare=False)

    def parts(self) -> tuple[Template, list[Message], bool]:
        marked, tools, options, prompt = json.loads(self.asked)
        return Template(self.tokenizer, tools, options, self.now), marked, prompt


@lru_cache(maxsize=2048)
def _rendered_once(shape: Shape) -> str:
    template, marked, prompt = shape.parts()
    return template.render(marked, prompt=prompt)


def _words(error: Exception) -> str:
    """What an error of a template says. Jinja's own, which templates raise, need no name."""
    from jinja2 import TemplateError

    if isinstance(error, TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@lru_cache(maxsize=64)
def _time_formats(template: str) -> tuple[str, ...] | None:
    """The formats in which a template tells the time; None where they are not written out."""
    calls = re.findall(r"strftime_now(?!\s+is\s)", template)
    formats = re.findall(r"strftime_now\(\s*(['\"])([^'\"\\]*)\1\s*\)", template)
    return tuple(found for _, found in formats) if len(formats) == len(calls) else None


@lru_cache(maxsize=16)
def _swallowed(tokenizer: Any) -> re.Pattern[str] | None:
    """White space that added tokens take in, as those of Phi-3 do: it is neither read nor learned,
    as if the template had trimmed it.
    """
    added = tokenizer.added_tokens_decoder.values()
    space = r"[^\S\x1c-\x1f]+"  # what the tokenizers' library calls white space
    behind = [f"(?<={re.escape(str(token))}){space}" for token in added if token.rstrip]
    before = [f"{space}(?={re.escape(str(token))})" for token in added if token.lstrip]
    return re.compile("|".join(behind + before)) if behind or before else None


# ---- scaffolds -----------------------------------------------------------------------------------


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
        text = _rendered_once(shape)
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
    _check_roles(scaffold)
    real = [scaffold.messages[i] if i in verbatim else m for i, m in enumerate(messages)]
    text = template.render(real, prompt=prompt)
    forms = [_to_show(mark, scaffold, messages, verbatim) for mark in scaffold.marks]
    shown: list[str] = []
    for mark, (here, whole) in zip(scaffold.marks, _walk(scaffold, forms, text), strict=True):
        shown.append(here)
        if here != whole and mark.message not in kept:
            _check_indentation(mark.message, whole, here)
            notes.add(TRIMMED)
    return scaffold, text, shown, notes


def _to_show(
    mark: Mark, scaffold: Scaffold, messages: Sequence[Message], verbatim: Collection[int]
) -> list[str]:
    """What the text may show in place of a mark."""
    if mark.message in verbatim:
        return [scaffold.text[mark.start : mark.stop]]
    said = scaffold.said_by(mark)
    if messages[mark.message]["role"] != "tool" or mark.part != "TEXT":
        return [said]
    # Some templates write what a function returned as JSON, as it may be a text or an object.
    return list(dict.fromkeys([said, *json_forms(said)]))


def json_forms(said: str) -> list[str]:
    """A text as JSON writes it between quotation marks."""
    return [json.dumps(said, ensure_ascii=escapes)[1:-1] for escapes in (False, True)]


def _missing(scaffold: Scaffold, messages: Sequence[Message], kept: Collection[int]) -> set[str]:
    """Notes on what the template leaves out and may.

    Raises:
        MessageError: It leaves out what it may not, or writes something twice.
    """
    written = [mark.key for mark in scaffold.marks]
    notes: set[str] = set()
    for (number, part), text in scaffold.said.items():
        times = written.count((number, part))
        if part.startswith("CALL"):
            times -= _repeated(scaffold, messages, (number, part))
        if not text or times == 1:
            continue
        if times > 1:
            raise MessageError(number, f": {_REWRITTEN}")
        if part in _THINKING and number not in kept:
            notes.add(FORGOTTEN)
            continue
        if (
            part == "NAME"
            and messages[number]["role"] == "tool"
            and text in _called(messages[:number])
        ):
            notes.add(UNWRITTEN_NAMES)
            continue
        is_last = number == len(messages) - 1
        raise MessageError(number, dropped(messages[number], part, is_last=is_last))
    return notes


def _called(messages: Sequence[Message]) -> set[str]:
    """The names of the functions that are called."""
    return {c["function"]["name"] for message in messages for c in message.get("tool_calls") or ()}


def _repeated(scaffold: Scaffold, messages: Sequence[Message], call: tuple[int, str]) -> int:
    """How often a function's name is written again over what the function returned."""
    following = [*scaffold.marks[1:], None]
    pairs = list(zip(scaffold.marks, following, strict=True))
    return sum(
        mark.key == call
        and after is not None
        and after.message > mark.message
        and messages[after.message]["role"] == "tool"
        for mark, after in pairs[_first(scaffold, call) + 1 :]
    )


def _first(scaffold: Scaffold, key: tuple[int, str]) -> int:
    return next((at for at, mark in enumerate(scaffold.marks) if mark.key == key), 0)


_REWRITTEN = (
    "the chat template rewrites messages, so that what is learned would not be what the row says; "
    "give a chat_template that keeps them as they are"
)


def dropped(message: Message, part: str, *, is_last: bool) -> str:
    """What to say of a part of a message that the template leaves out."""
    if part in _THINKING and not is_last:
        return (
            ": the chat template drops the thinking of an answer that is not the last; set "
            "train_on='last', or give each answer a row of its own"
        )
    if part in _THINKING:
        place = ".reasoning_content" if part == "REASONING" else ""
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


def _check_roles(scaffold: Scaffold) -> None:
    """See that the template tells whose each message is.

    Raises:
        MessageError: It writes one as if another role had said it.
    """
    if misread := _misread(scaffold.shape, scaffold.marking):
        index, role, other = misread
        raise MessageError(
            index,
            f": the chat template writes what {role!r} says as if {other!r} said it; give a "
            "chat_template that knows the role, or the message another role",
        )


@lru_cache(maxsize=2048)
def _misread(shape: Shape, marking: Marking) -> tuple[int, str, str] | None:
    """The first message that is written as another role's, its role, and the other.

    That is one which is rendered alike under both, except where a template writes no roles at all,
    or tells the turns of user and assistant apart by their place.
    """
    template, marked, prompt = shape.parts()
    text, header = _rendered_once(shape), _asking(template)
    first, behind, stop = dict[int, int](), dict[int, int](), 0
    for mark in marking.found(text):
        first.setdefault(mark.message, mark.start)
        behind.setdefault(mark.message, stop)
        stop = mark.stop
    for index, message in enumerate(marked):
        role: str = message["role"]
        alike = [
            other
            for other in ("user", "assistant")
            if other != role and _given_to(template, marked, index, other, prompt) == text
        ]
        if role in ("user", "assistant"):
            before = text[behind.get(index, 0) : first.get(index, 0)].rstrip()
            is_asked = before.endswith(header) if header and before else role == "assistant"
            if header and is_structured(message):  # a call has more before it in its turn
                is_asked = header in before
            alike = alike if is_asked != (role == "assistant") else []
        elif len(alike) == 2 and not header:
            alike = []
        if alike:
            return index, role, alike[-1]
    return None


def _given_to(
    template: Template, marked: Sequence[Message], index: int, role: str, prompt: bool
) -> str | None:
    """The conversation with a message in another role; None where the template refuses that."""
    other = [{**m, "role": role} if i == index else m for i, m in enumerate(marked)]
    try:
        return template.scaffold(other, prompt=prompt)
    except ValueError:
        return None


def _asking(template: Template) -> str:
    """What the template writes to ask for an answer, without white space around it."""
    question = [{"role": "user", "content": Marking().written(0, "TEXT")}]
    try:
        plain, asked = (template.scaffold(question, prompt=prompt) for prompt in (False, True))
    except ValueError:
        return ""
    return asked.removeprefix(plain).strip() if asked.startswith(plain) else ""


def _walk(
    scaffold: Scaffold, forms: Sequence[Sequence[str]], text: str
) -> Iterator[tuple[str, str]]:
    """What `text` shows in place of each mark, and the form of what is said that it is, which may
    have white space around it.

    Raises:
        MessageError: `text` is not the scaffold with the texts in place of the marks.
    """
    marks = scaffold.marks
    stops = [*(mark.start for mark in marks), len(scaffold.text)]
    position = stops[0]
    matches = text.startswith(scaffold.text[: stops[0]])
    for mark, stop, said in zip(marks, stops[1:], forms, strict=True):
        piece = scaffold.text[mark.stop : stop]
        tried = ((_shown(text, position, form, piece), form) for form in said if matches)
        shown, form = next((pair for pair in tried if pair[0] is not None), (None, ""))
        if shown is None:
            raise MessageError(mark.message, f": {_REWRITTEN}")
        yield shown, form
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


def is_structured(message: Message) -> bool:
    """Whether the template writes more of the message than its content."""
    return bool(message.get("reasoning_content") or message.get("tool_calls"))


def _check_indentation(index: int, said: str, shown: str) -> None:
    """Without the indentation of its first line, code and lists mean something else."""
    lost = said[: len(said) - len(said.lstrip())].removesuffix(
        shown[: len(shown) - len(shown.lstrip())]
    )
    if lost and lost[-1] in " \t" and "\n" in said.strip():
        raise MessageError(
            index,
            ": the chat template, or a token that it writes, trims the indentation of its first "
            "line; begin it with a line of words, or give a chat_template that does not trim",
        )
