"""A chat template of the user's own, and options that are written into it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from openweights.errors import ConfigError


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
