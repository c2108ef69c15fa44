"""Requests and responses as OpenAI's API writes them: parsed, checked and built; no I/O.

What a request asks for and we cannot do is refused by name. What changes no answer (`user`,
`metadata`, …) is passed over, as are fields of newer clients that we do not know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from openweights.errors import ConfigError
from openweights.generation.params import Delta, SamplingParams
from openweights.generation.prompts import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
# What templates are given beside `chat_template_kwargs`.
_NOT_OPTIONS = ("tokenizer", "messages", "tools", "verbatim", "now")
_random = SystemRandom()


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Part(BaseModel):
    type: Literal["text", "input_text"] = "text"
    text: str


class _Function(BaseModel):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class Message(BaseModel):
    """One of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": text}


class _StreamOptions(BaseModel):
    include_usage: bool = False


# What other servers can do beside OpenAI's fields, each with the values that ask for nothing.
_OTHERS: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "documents": (),
    "tool_choice": ("none", "auto"),
    **dict.fromkeys(("bad_words", "allowed_token_ids", "prompt_logprobs", "audio"), ()),
    **dict.fromkeys(("truncate_prompt_tokens", "structured_outputs", "web_search_options"), ()),
    **{f"guided_{kind}": () for kind in ("json", "regex", "choice", "grammar")},
}


class Request(BaseModel, extra="allow"):
    """What both kinds of request have.

    Attributes:
        top_k, min_p, min_tokens, stop_token_ids, ignore_eos, skip_special_tokens: As in vLLM.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    # What we cannot do; the value that asks for nothing is taken.
    logit_bias: None | dict[str, float] = None

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether the log-probabilities of the tokens are wanted."""
        raise NotImplementedError

    @property
    def likeliest(self) -> int:
        """Of so many likeliest tokens, too."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """Most tokens of a completion; None for as many as the context takes."""
        raise NotImplementedError

    def sampling(self, room: int, ends: Sequence[int]) -> SamplingParams:
        """How it is drawn, where the prompt leaves `room` tokens of the context, and `ends` are the
        model's own end tokens, which count beside those of the request.

        Raises:
            ConfigError: A value cannot be used.
        """
        limit = room if self.limit is None else min(self.limit, room)
        if self.limit is not None and self.min_tokens > self.limit:
            raise ConfigError(
                f"min_tokens: is {self.min_tokens}, above the {self.limit} tokens that are asked "
                "for at most; lower it"
            )
        seed = _random.getrandbits(63) if self.seed is None else self.seed % 2**63
        own = () if self.ignore_eos else ends
        return SamplingParams(
            max_new_tokens=max(limit, 1),
            min_new_tokens=min(self.min_tokens, max(limit, 1)),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            min_p=self.min_p or 0.0,
            n=self.n or 1,
            stop_token_ids=(*own, *(self.stop_token_ids or ())),
            stop=tuple(self.stop or ()),
            logprobs=self.asks_for_logprobs,
            top_logprobs=self.likeliest,
            seed=seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            skip_special_tokens=self.skip_special_tokens,
        )


class ChatRequest(Request):
    """Of /v1/chat/completions.

    Attributes:
        chat_template_kwargs: What the template reads beside the messages, as in vLLM.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def asks_for_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def likeliest(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else 0

    @property
    def limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def asks_for_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def likeliest(self) -> int:
        return self.logprobs or 0

    @property
    def limit(self) -> int | None:
        return _DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or as token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


def parse_chat(body: object) -> ChatRequest:
    """A chat request.

    Raises:
        ConfigError: It asks for what is wrong, or what we cannot do; names the field.
    """
    request = _parsed(ChatRequest, body)
    kind = (request.response_format or {}).get("type", "text")
    unable = {
        "tools": request.tools,
        "functions": request.functions,
        "response_format": None if kind == "text" else kind,
        "logit_bias": request.logit_bias,
    }
    if request.top_logprobs and not request.logprobs:
        raise ConfigError("top_logprobs: needs logprobs=true; set it, or leave top_logprobs out")
    options = request.chat_template_kwargs or {}
    _refuse(unable | {f"chat_template_kwargs.{name}": name in options for name in _NOT_OPTIONS})
    return request


def parse_completion(body: object) -> CompletionRequest:
    """A text request; raises as `parse_chat`."""
    request = _parsed(CompletionRequest, body)
    best_of = None if request.best_of in (None, request.n or 1) else request.best_of
    _refuse(
        {
            "echo": request.echo,
            "suffix": request.suffix,
            "best_of": best_of,
            "logit_bias": request.logit_bias,
        }
    )
    if not request.prompts():
        raise ConfigError("prompt: is empty; give a text")
    return request


def _refuse(unable: Mapping[str, object]) -> None:
    for name, value in unable.items():
        if value:
            raise ConfigError(f"{name}: this server cannot do that; leave it out")


def _parsed(kind: type[Any], body: object) -> Any:
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise ConfigError(f"{place or 'body'}: {detail['msg']}") from None
    given: dict[str, Any] = request.model_extra
    _refuse({name: given.get(name) not in (None, *free) for name, free in _OTHERS.items()})
    return request


# ---- responses -----------------------------------------------------------------------------------


@dataclass
class Choice:
    """A completion as it grows.

    Attributes:
        deltas: All that has come of it.
    """

    deltas: list[Delta] = field(default_factory=list[Delta])

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> int:
        return sum(len(delta.token_ids) for delta in self.deltas)

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None


@dataclass(frozen=True)
class Responses:
    """Builds the responses to one request.

    Attributes:
        request: What was asked.
        tokenizer: Names the tokens of log-probabilities.
        prompt_tokens: Of all its prompts.
        adapter: Which one answers, as its weights are called; None for the base model.
    """

    request: ChatRequest | CompletionRequest
    tokenizer: PreTrainedTokenizerBase
    prompt_tokens: int
    adapter: str | None = None
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece."""
        made = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head(""), "choices": made, "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """What it took, in tokens."""
        tokens = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    def first_chunk(self, index: int) -> dict[str, Any]:
        """What opens a choice of a streamed chat."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head(".chunk"), "choices": [choice]}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A piece of a streamed answer."""
        reason = delta.finish_reason
        if not self.is_chat:
            logprobs = self._text_logprobs([delta])
            choice = {"index": index, "text": delta.text, "logprobs": logprobs}
        else:
            content = {"content": delta.text} if delta.text or not reason else {}
            choice = {"index": index, "delta": content, "logprobs": self._chat_logprobs([delta])}
        return {**self._head(".chunk"), "choices": [{**choice, "finish_reason": reason}]}

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What ends a stream that was asked for its usage."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage(choices)}

    def _head(self, chunk: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", f"chat.completion{chunk}") if self.is_chat else ("cmpl", "")
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind or "text_completion",
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": self.adapter,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        head = {"index": index, "finish_reason": choice.finish_reason}
        if not self.is_chat:
            logprobs = self._text_logprobs(choice.deltas)
            return {**head, "text": choice.text, "logprobs": logprobs}
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {**head, "message": message, "logprobs": self._chat_logprobs(choice.deltas)}

    def _entries(self, deltas: Sequence[Delta]) -> list[dict[str, Any]] | None:
        if not self.request.asks_for_logprobs:
            return None
        return [entry for delta in deltas for entry in token_logprobs(self.tokenizer, delta)]

    def _chat_logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        entries = self._entries(deltas)
        return None if entries is None else {"content": entries, "refusal": None}

    def _text_logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        entries = self._entries(deltas)
        if entries is None:
            return None
        offsets, at = list[int](), 0
        for entry in entries:
            offsets.append(at)
            at += len(entry["token"])
        tops = [{top["token"]: top["logprob"] for top in e["top_logprobs"]} for e in entries]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops if self.request.likeliest else None,
            "text_offset": offsets,
        }


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    field_name, colon, _ = message.partition(": ")
    param = field_name if colon and field_name.isidentifier() else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
