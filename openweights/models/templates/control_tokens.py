"""The vocabulary's own tokens, which no message and no tool may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from openweights.json_values import texts_of
from openweights.models.templates.ends import end_of_turn, exchange_text
from openweights.models.templates.messages import Message, MessageError
from openweights.models.templates.scaffold import scaffold_of_roles

_HOLDS = (
    "{place}: holds {token!r}, a control token of the model, which would not be read as text; "
    "remove it, or write it in another way"
)


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


def _control_token(value: Mapping[str, Any], pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Where in a value the first control token is, and which."""
    own = [*value, *value.values()]
    if all(isinstance(text, str) for text in own) and not any(map(pattern.search, own)):
        return None  # of nearly all messages it is known at once
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
            scaffold = scaffold_of_roles(tokenizer, *before, role, "user", "assistant")
            header = scaffold.before(len(before)) if scaffold else ""
            tokens = re.findall("|".join(map(re.escape, added)) or r"(?!)", header)
            found.update([token for token in tokens if token not in closing][:1])
    return found
