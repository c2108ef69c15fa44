"""From conversations to prompts, and from tokens to log-probabilities as OpenAI writes them.

No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from openweights.generation.params import Completion, Delta
from openweights.models.reading import check_weights, is_begun, token_ids, tokenised, tokens_of
from openweights.models.templates.control_tokens import refuse_control_tokens
from openweights.models.templates.messages import Message, plain_message
from openweights.models.templates.rendering import rendered_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    prefill: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """What the model continues to answer a conversation.

    A last message of the assistant is the beginning of the answer, and is continued.

    Args:
        prefill: How the answer begins; what the model says comes after it.
        tools: Schemas of functions that the assistant may call.
        options: What the template reads beside that.

    Raises:
        ConfigError: The tokenizer has no chat template.
        ValueError: The template refuses the conversation, or changes what it says; or the answer
            that is to be continued is more than a text.
    """
    plain = [plain_message(message) for message in messages]
    continues = bool(plain) and plain[-1]["role"] == "assistant"
    asked = plain[:-1] if continues else plain
    text = rendered_prompt(tokenizer, asked, tools=tools, **(options or {})).text
    answer = (_begun(tokenizer, plain) if continues else "") + prefill
    if not answer:
        return token_ids(tokenizer, text)
    # In training an answer begins with a token of its own, too.
    ids, _ = tokens_of(text + answer, [len(text)], tokenizer)
    check_weights(tokenizer, ids)
    return ids


def _begun(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of the last message, an answer that is continued."""
    last = messages[-1]
    if more := sorted(last.keys() - {"role", "content"}):
        raise ValueError(
            f"messages[{len(messages) - 1}].{more[0]}: an answer that is continued is a text; "
            "write it into the content, as the model would, or add what comes after it"
        )
    refuse_control_tokens(tokenizer, messages)
    return last["content"]


def text_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the model continues to go on with a text, with the tokens that begin one; not with those
    that some tokenizers end it with.

    Raises:
        ValueError: It is no text.
    """
    begins = not is_begun(tokenizer, text)
    ids: list[int] = tokenised(tokenizer, text, add_special_tokens=begins).ids
    ends = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if ends and len(ids) > 1 else ids


def token_logprobs(
    tokenizer: PreTrainedTokenizerBase, grown: Completion | Delta
) -> list[dict[str, Any]]:
    """Of each token `token`, `bytes`, `logprob` in nats, and `top_logprobs`, likeliest first."""
    tops = grown.top_logprobs or [{}] * len(grown.token_ids)
    return [
        {
            **_named(tokenizer, token, value),
            "top_logprobs": [_named(tokenizer, *top) for top in top_values.items()],
        }
        for token, value, top_values in zip(grown.token_ids, grown.logprobs, tops, strict=True)
    ]


def _named(tokenizer: PreTrainedTokenizerBase, token: int, value: float) -> dict[str, Any]:
    raw = _token_bytes(tokenizer, token)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        # A part of a character has no text; OpenAI names it so, too.
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    # JSON has no infinity, which a token that the model rules out has; and max takes no NaN.
    return {"token": text, "bytes": list(raw), "logprob": max(_LOWEST_LOGPROB, value)}


_LOWEST_LOGPROB = -9999.0  # as OpenAI writes what is not to be


def _token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    text = str(tokenizer.decode([token]))
    if _UNFINISHED not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(fallback[1])
    level = _byte_level()
    known = all(character in level for character in name)
    return bytes(level[character] for character in name) if known else text.encode()


_UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no character


@cache
def _byte_level() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a character: itself where it can be printed, else
    one above 255, in order (GPT-2's encoder).
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(others)}
