"""The tokens with which a chat template ends an answer, or hands over to a function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from openweights.models.templates.messages import Message
from openweights.models.templates.scaffold import Scaffold, scaffold_of, scaffold_of_roles
from openweights.models.templates.template import Template

_ARGUMENT = "leafofthetree"


# Of tokenizers whose model says by which tokens its completions end.
_OF_MODEL: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()


def tell_ends_of_model(tokenizer: Any, ids: Any) -> None:
    """Have `end_ids` know what a model's generation config calls ends: an id, several, or None."""
    _OF_MODEL[tokenizer] = tuple(_as_ids(ids))


def end_ids(tokenizer: Any, of_model: Any = None) -> list[int]:
    """Every id that ends a completion: the tokenizer's, those of the generation config, and what
    ends a turn or a call in the chat template, whatever the other two say.

    Args:
        of_model: What the generation config says; None for what was told of it.
    """
    said = _OF_MODEL.get(tokenizer) if of_model is None else of_model
    written = filter(None, [end_of_turn(tokenizer), end_of_call(tokenizer)])
    given = (tokenizer.eos_token_id, said, *map(tokenizer.convert_tokens_to_ids, written))
    known = dict.fromkeys(end for ids in given for end in _as_ids(ids))
    return [end for end in known if tokenizer.convert_ids_to_tokens(end) is not None]


def _as_ids(given: Any) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def end_token(ends: Sequence[str], behind: str) -> re.Match[str] | None:
    """The first end token behind an answer, as group 1, and those that follow it at once, as behind
    an answer of Cohere 2. What the template writes before it, such as a closing tag, is said with
    the answer, too.
    """
    choices = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True) if end)
    return re.compile(f".*?({choices})(?:{choices})*", re.DOTALL).match(behind) if choices else None


def end_of_turn(tokenizer: Any) -> str | None:
    """The token that the template writes behind an answer; None where it writes none."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    for turns in (1, 2):  # some leave the last turn open
        scaffold = scaffold_of_roles(tokenizer, *("user", "assistant") * turns)
        if scaffold is None or len(scaffold.marks) != 2 * turns:
            continue
        stops = [*(mark.start for mark in scaffold.marks), len(scaffold.text)]
        behind = scaffold.text[scaffold.marks[1].stop : stops[2]]
        # Behind other text it may be the beginning of the next turn.
        opening = scaffold.text[: stops[0]]
        later = [
            token for token in added if token not in opening or behind.lstrip().startswith(token)
        ]
        token = end_token(later, behind)
        if token and token[1] != tokenizer.bos_token:
            return token[1]
    return None


def space_behind(tokenizer: Any) -> str:
    """White space that the template writes behind an answer, before the token that ends it."""
    scaffold = scaffold_of_roles(tokenizer, "user", "assistant")
    behind = scaffold.text[scaffold.marks[-1].stop :] if scaffold and scaffold.marks else ""
    return behind[: len(behind) - len(behind.lstrip())]


def exchange_text(tokenizer: Any) -> str:
    """A question and its answer as the template writes them; empty where it refuses them."""
    scaffold = scaffold_of_roles(tokenizer, "user", "assistant")
    return scaffold.marking.hidden(scaffold.text) if scaffold else ""


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
