"""Whether a chat template writes tools and the arguments of calls, as they are.

As in `comparison.py`, a conversation is rendered once as it is and once with marks, here in place
of the names and descriptions in tools, and of each key and value in arguments. The first must be
the second with what the marks stand for in their places, in some notation for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from openweights.models.templates.comparison import TRIMMED, dropped
from openweights.models.templates.messages import Message, MessageError
from openweights.models.templates.scaffold import Scaffold, scaffold_of
from openweights.models.templates.template import Template

_MARKS = re.compile(r"Leaf(\d{6})Tree|7310(\d{6})(?:\.5)?")
_SPAN = 10_000  # marks that a row has at most
# Keywords of a schema that say how it is built. Templates have other ways to say that.
_BUILD = {
    *("type", "function", "parameters", "properties", "required", "items"),
    *("name", "description", "enum"),  # whose texts are looked for
}

UNWRITTEN_IDS = "the chat template does not write the ids of calls"
UNWRITTEN_KEYWORDS = "the chat template does not write {keys} of the tools"
_TOOLS_DROPPED = (
    "tools: the chat template does not write them; describe them in the system message, or give a "
    "chat_template that does"
)


@dataclass(slots=True)
class _Marks:
    """Marks, with what each stands for, and where that is in the row.

    Attributes:
        real: What is rendered without marks, which may hold what looks like some.
        empty: By the mark of its key, a value that counts as false, which has no mark.
        message: Whose parts are being marked.
        owners: The message of each mark.
        may_trim: White space at the ends of texts may be lost, as in what is read alone.
        has_trimmed: It was.
        ignores_case: Marks of keys are in the order of their letters, whether small or capital.
    """

    real: str
    first: int = 0
    empty: dict[str, object] = field(default_factory=dict[str, object])
    places: dict[str, str] = field(default_factory=dict[str, str])
    said: dict[str, object] = field(default_factory=dict[str, object])
    message: int = 0
    owners: dict[str, int] = field(default_factory=dict[str, int])
    may_trim: bool = False
    has_trimmed: bool = False
    ignores_case: bool = False

    def __post_init__(self) -> None:
        taken = {int(mark[1] or mark[2]) for mark in _MARKS.finditer(self.real)}
        starts = range(0, 1_000_000, _SPAN)
        self.first = next(n for n in starts if not any(n <= mark < n + _SPAN for mark in taken))

    @property
    def _next(self) -> int:
        return self.first + len(self.said)

    def _order(self, item: tuple[str, Any]) -> tuple[str, str]:
        return (item[0].lower() if self.ignores_case else "", item[0])

    def text(self, said: str, place: str) -> str:
        """A mark for a text; an empty one stays, since templates ask for that."""
        return self._add(f"Leaf{self._next:06}Tree", said, place) if said else said

    def arguments(self, value: Any, place: str) -> Any:
        """A copy with a mark in place of each key and value. Templates ask what a value is, so a
        mark is one of its type, and what counts as false stays; and they sort keys.
        """
        if isinstance(value, Mapping):
            given = cast("Mapping[str, Any]", value)
            marked: dict[str, tuple[str, Any]] = {}
            for key, item in sorted(given.items(), key=self._order):
                at = f"{place}.{key}"
                mark = self.text(key, at)
                marked[key] = mark, self.arguments(item, at)
                if not item and not isinstance(item, str):
                    self.empty[mark] = item
            return dict(marked[key] for key in given)
        if isinstance(value, list):
            items = enumerate(cast("list[Any]", value))
            return [self.arguments(item, f"{place}[{index}]") for index, item in items]
        if isinstance(value, str):
            return self.text(value, place)
        if isinstance(value, bool) or not value:
            return value
        number = 7310_000_000 + self._next
        number += 0.5 if isinstance(value, float) else 0
        self._add(str(number), value, place)
        return number

    def schema(self, value: Any, place: str) -> Any:
        """A copy of a tool, or of a part of one, with marks in place of names, descriptions and
        choices.
        """
        if isinstance(value, list):
            items = enumerate(cast("list[Any]", value))
            return [self.schema(item, f"{place}[{index}]") for index, item in items]
        if not isinstance(value, Mapping):
            return value
        given = dict(cast("Mapping[str, Any]", value))
        inner = given.get("properties")
        named = cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}
        names = {name: self.text(name, f"{place}.properties.{name}") for name in named}
        marked: dict[str, Any] = {}
        for key, item in given.items():
            at = f"{place}.{key}"
            if key in ("name", "description") and isinstance(item, str):
                marked[key] = self.text(item, at)
            elif key == "properties" and named:
                marked[key] = {names[n]: self.schema(i, f"{at}.{n}") for n, i in named.items()}
            elif key == "required" and isinstance(item, list):
                marked[key] = [names.get(str(n), n) for n in cast("list[Any]", item)]
            elif key == "enum":
                marked[key] = self.arguments(item, at)
            else:
                marked[key] = self.schema(item, at)
        return marked

    def _add(self, mark: str, said: object, place: str) -> str:
        self.said[mark], self.places[mark], self.owners[mark] = said, place, self.message
        return mark

    def lost(self, marked: str, real: str) -> str | None:
        """The mark of what is not written as it is; None where everything is."""
        found = [mark for mark in _MARKS.finditer(marked) if mark[0] in self.said]
        missing = self.said.keys() - {mark[0] for mark in found}
        if missing or not found:
            return min(missing, default=None)
        position = found[0].start()
        if not real.startswith(marked[:position]):
            return found[0][0]
        stops = [*(mark.start() for mark in found[1:]), len(marked)]
        for mark, stop in zip(found, stops, strict=True):
            behind = marked[mark.end() : stop]
            said = self.said[mark[0]]
            shown = _shown(real, position, said, behind)
            if shown is None and self.may_trim:
                shown = _shown(real, position, str(said).strip(), behind)
                self.has_trimmed = True
            if shown is None or not self._is_written(mark[0], behind):
                return mark[0]
            position += len(shown)
        return None

    def _is_written(self, key: str, behind: str) -> bool:
        """Whether a value that counts as false stands behind its key."""
        if key not in self.empty:
            return True
        value = self.empty[key]
        forms = {str(value).lower(), json.dumps(value)}
        return any(form in behind.lower() for form in forms)


def _shown(real: str, position: int, said: object, behind: str) -> str | None:
    """A form of a value at a position, with what stands behind it; None where there is none."""
    forms = (form + behind for form in _forms(said))
    return next((form for form in forms if real.startswith(form, position)), None)


def _forms(said: object) -> Iterator[str]:
    """How templates write a value: as text, and as in JSON's and Python's notation."""
    yield str(said)
    if isinstance(said, str):
        yield json.dumps(said)[1:-1]
        yield json.dumps(said, ensure_ascii=False)[1:-1]
        yield repr(said)[1:-1]


def check_functions(
    template: Template, messages: Sequence[Message], *, prompt: bool = False
) -> set[str]:
    """See that tools, and the arguments of calls, are written as they are.

    Returns:
        Notes on what the template leaves out and may.

    Raises:
        MessageError: Something of a message's calls is lost.
        ValueError: Something of the tools is lost, or the template refuses the conversation.
    """
    called = [index for index, message in enumerate(messages) if message.get("tool_calls")]
    if not template.tools and not called:
        return set()
    scaffold = scaffold_of(template, messages, prompt=prompt, verbatim=())
    if called:
        checked: list[tuple[_Marks, str]] = []
        for ignores_case in (True, False):  # how templates that sort do it
            marks = _Marks(scaffold.text, ignores_case=ignores_case)
            marked = [*scaffold.messages]
            for marks.message in called:
                marked[marks.message] = _marked_calls(marked[marks.message], marks)
            checked.append((marks, template.scaffold(marked, prompt=prompt)))
            if marks.lost(checked[-1][1], scaffold.text) is None:
                break
        _check_calls(messages, *checked[-1], scaffold)
    notes = _check_tools(template, scaffold.messages, scaffold.text, prompt=prompt)
    ids = [call.get("id") for index in called for call in messages[index]["tool_calls"]]
    ids += [message.get("tool_call_id") for message in messages]
    if any(given and given not in scaffold.text for given in ids):
        notes.add(UNWRITTEN_IDS)
    return notes


def _marked_calls(message: Message, marks: _Marks) -> Message:
    def marked(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        place = f".tool_calls[{number}].function.arguments"
        arguments = marks.arguments(function["arguments"], place)
        return {**call, "function": {**function, "arguments": arguments}}

    calls = message["tool_calls"]
    return {**message, "tool_calls": [marked(n, call) for n, call in enumerate(calls)]}


def _check_calls(
    messages: Sequence[Message], marks: _Marks, marked: str, scaffold: Scaffold
) -> None:
    lost = marks.lost(marked, scaffold.text)
    if lost is None:
        return
    index = marks.owners[lost]
    if not any(mark in marked for mark, owner in marks.owners.items() if owner == index):
        raise MessageError(index, dropped(messages[index], "CALL", is_last=False))
    calls = {key for key in scaffold.said if key[0] == index and key[1].startswith("CALLX")}
    if calls - {mark.key for mark in scaffold.marks}:
        raise MessageError(index, dropped(messages[index], "CALLX", is_last=False))
    raise MessageError(
        index,
        f"{marks.places[lost]}: the chat template does not write it as it is; write the call into "
        "the content, or give another chat_template",
    )


def _check_tools(
    template: Template, messages: Sequence[Message], real: str, *, prompt: bool
) -> set[str]:
    if not template.tools:
        return set()
    marks = _Marks(real, may_trim=True)
    tools = [marks.schema(tool, f"tools[{index}]") for index, tool in enumerate(template.tools)]
    marked = replace(template, tools=tools).scaffold(messages, prompt=prompt)
    lost = marks.lost(marked, real)
    if lost is not None and not any(mark in marked for mark in marks.said):
        raise ValueError(_TOOLS_DROPPED)
    if lost is not None:
        raise ValueError(
            f"{marks.places[lost]}: the chat template does not write it as it is; describe it in "
            "the system message, or give another chat_template"
        )
    unwritten = sorted(key for key in set(_keywords(tools)) - _BUILD if key not in marked)
    keys = ", ".join(map(repr, unwritten))
    notes = {UNWRITTEN_KEYWORDS.format(keys=keys)} if unwritten else set[str]()
    return notes | {TRIMMED} if marks.has_trimmed else notes


def _keywords(value: Any) -> Iterator[str]:
    """The keys in a marked tool that are no names of properties."""
    if isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _keywords(item)
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            if not _MARKS.fullmatch(key):
                yield key
            yield from _keywords(item)
