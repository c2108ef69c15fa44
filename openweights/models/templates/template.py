"""A chat template, asked to render a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from openweights.errors import ConfigError
from openweights.models.templates.messages import Message


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
        return rendered_once(self.shape(marked, prompt=prompt))

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
def rendered_once(shape: Shape) -> str:
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
