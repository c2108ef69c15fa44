"""Whether what a chat template makes of a conversation is what the messages say.

The conversation is rendered twice, as it is and as a scaffold. The first must be the second with
the texts in the places of their marks: a text that is dropped, repeated, rewritten, or given to
another role is refused with the message's place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

from openweights.models.templates.marks import Mark, Marking
from openweights.models.templates.messages import Message, MessageError, is_structured
from openweights.models.templates.scaffold import Scaffold, scaffold_of
from openweights.models.templates.template import Shape, Template, rendered_once

_THINKING = ("THOUGHT", "REASONING")

TRIMMED = (
    "the chat template, or a token that it writes, trims white space at the ends of what is read"
)

UNWRITTEN_NAMES = "the chat template does not write the names on what functions returned"

FORGOTTEN = "the chat template leaves out the thinking of earlier answers, as it does when sampling"

_REWRITTEN = (
    "the chat template rewrites messages, so that what is learned would not be what the row says; "
    "give a chat_template that keeps them as they are"
)


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
    return list(dict.fromkeys([said, *_json_forms(said)]))


def _json_forms(said: str) -> list[str]:
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
    if part.startswith("CALLX"):
        return (
            ".tool_calls: the chat template writes the first call of an answer alone; give each "
            "call an answer of its own, and what it returned behind it"
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
    text, header = rendered_once(shape), _asking(template)
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
