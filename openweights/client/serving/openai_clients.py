"""The OpenAI clients with which models are asked: the only importer of `openai` on this side."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import (
    ConfigError,
    ConfigurationError,
    InvalidInputError,
    NotFoundError,
    OpenWeightsError,
    PlatformError,
    closest,
    shown,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_TIMEOUT_S = 600.0
_LOOK_TIMEOUT_S = 10.0


# What an answer takes whole numbers from 1 for, and how far other numbers go.
_COUNTS = ("max_tokens", "max_completion_tokens", "n")
_RANGES = {"temperature": (0.0, math.inf), "top_p": (0.0, 1.0)}
_WRONG, _KEY, _MISSING, _OFTEN, _BROKEN = (400, 409, 413, 422), (401, 403), 404, 429, 500


def check_request(params: Mapping[str, Any], *, of_chats: bool) -> None:
    """See that a request is one before a model is deployed for it.

    Args:
        of_chats: Whether it is a conversation, else a text to go on with.

    Raises:
        ConfigError: A line for each parameter that is wrong, and what would work.
        ConfigurationError: The package openai is not installed.
    """
    openai = _openai()
    left_out = (openai.NotGiven, openai.Omit)
    given = {name: value for name, value in params.items() if not isinstance(value, left_out)}
    lines = _unknown(given, of_chats=of_chats)
    if of_chats:
        lines += _wrong_messages(given.get("messages"))
    elif not given.get("prompt"):
        lines.append("prompt: is missing; give a text to go on with")
    for name in _COUNTS:
        value = given.get(name)
        if value is not None and (type(value) is not int or value < 1):
            lines.append(f"{name}: must be a whole number of at least 1, not {shown(value)}")
    for name, (least, most) in _RANGES.items():
        value = given.get(name, least)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value <= most):
            bound = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            lines.append(f"{name}: must be a number, {bound}, not {shown(value)}")
    if lines:
        raise ConfigError("\n".join(lines))


def _unknown(params: Mapping[str, Any], *, of_chats: bool) -> list[str]:
    resources = _openai().resources
    kind = resources.chat.Completions if of_chats else resources.Completions
    known = [name for name in inspect.signature(kind.create).parameters if name != "self"]
    lines: list[str] = []
    for name in params:
        if name not in known:
            meant = closest(name, known)
            other = "leave it out, or put it into extra_body"
            remedy = f"did you mean {meant!r}?" if meant else other
            lines.append(f"{name}: is not a parameter; {remedy}")
    return lines


def _wrong_messages(messages: object) -> list[str]:
    example = "[{'role': 'user', 'content': 'Hello'}]"
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    items = cast("Sequence[object]", messages) if is_list else ()
    if not items:
        what = f"must be a list, not {shown(cast('object', messages))}"
        what = "are missing" if messages is None else what
        return [f"messages: {what}; write {example}"]
    wrong = [index for index, item in enumerate(items) if not _has_role(item)]
    return [f"messages[{wrong[0]}]: has no role; write it as in {example}"] if wrong else []


def _has_role(message: object) -> bool:
    """Whether it is a message: a dict, or what a model has answered."""
    if isinstance(message, Mapping):
        return isinstance(cast("Mapping[str, object]", message).get("role"), str)
    return isinstance(getattr(message, "role", None), str)


def said_by_server(error: Exception) -> str:
    """What a server has said of an error, without its status and the JSON around it."""
    body: object = getattr(error, "body", None)
    said = cast("Mapping[str, object]", body).get("message") if isinstance(body, Mapping) else None
    return said if isinstance(said, str) and said else str(error)


def in_our_words(error: Exception, model: str, *, at_openai: bool) -> Exception:
    """An error of OpenAI's client as one of this package; any other as it is."""
    if isinstance(error, OpenWeightsError) or not isinstance(error, _openai().OpenAIError):
        return error
    status, said = getattr(error, "status_code", None), said_by_server(error).rstrip(".")
    if not isinstance(status, int):
        reason = error.__cause__ or said
        remedy = "see to the network, or OPENAI_BASE_URL" if at_openai else "ask again"
        return PlatformError(f"{model}: its server cannot be reached ({reason}); {remedy}")
    if status in _WRONG:
        return InvalidInputError(f"{model}: its server does not take the request: {said}")
    if status in _KEY:
        remedy = "set OPENAI_API_KEY to a valid one" if at_openai else "ask again to deploy it"
        return ConfigurationError(f"{model}: its server does not take the key ({said}); {remedy}")
    if status == _MISSING:
        return NotFoundError(f"{model}: {said}; correct the name of the model")
    if status == _OFTEN:
        return PlatformError(f"{model}: too many requests, or no money left ({said}); ask later")
    what = "failed" if status >= _BROKEN else "gave no answer"
    return PlatformError(f"{model}: its server {what}, with status {status} ({said}); ask again")


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError:
        raise ConfigurationError(
            "asking a model needs the package openai: pip install openai"
        ) from None
    return openai


class Streamed:
    """A streamed answer, whose errors are ours; else as OpenAI's client gives it.

    Args:
        explained: An error as the caller should see it.
    """

    def __init__(self, stream: Any, explained: Callable[[Exception], Exception]) -> None:
        self._stream = stream
        self._explained = explained

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._stream
        except Exception as error:
            raise self._explained(error) from error

    def __next__(self) -> Any:
        try:
            return next(self._stream)
        except StopIteration:
            raise
        except Exception as error:
            raise self._explained(error) from error

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for chunk in self._stream:
                yield chunk
        except Exception as error:
            raise await asyncio.to_thread(self._explained, error) from error

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    async def __aenter__(self) -> Streamed:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.close()


class Clients:
    """Both kinds of client of one server; without an address those of OpenAI itself.

    Args:
        retries: A request to a server of ours is not repeated: it would be computed twice.

    Raises:
        ConfigurationError: The package is not installed, or OpenAI's key is not set.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, retries: int = 0
    ) -> None:
        openai = self._openai = _openai()
        self._given: dict[str, Any] = {"base_url": base_url, "api_key": api_key}
        self._given |= {"max_retries": retries, "timeout": _TIMEOUT_S}
        # One for each event loop: connections of a loop that has ended cannot be used again.
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = (
            weakref.WeakKeyDictionary()
        )
        try:
            self.sync: OpenAI = openai.OpenAI(**self._given)
        except openai.OpenAIError as error:
            raise ConfigurationError(f"OpenAI's models need OPENAI_API_KEY: {error}") from None

    @property
    def asynchronous(self) -> AsyncOpenAI:
        """The asynchronous client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            self._by_loop[loop] = self._openai.AsyncOpenAI(**self._given)
        return self._by_loop[loop]

    def close(self) -> None:
        """Release the connections; those of a running event loop as soon as it comes to it."""
        self.sync.close()
        for loop, client in list(self._by_loop.items()):
            with contextlib.suppress(RuntimeError):  # the loop is closed, and they with it
                loop.call_soon_threadsafe(lambda c=client: asyncio.ensure_future(c.close()))

    def is_answered(self) -> bool:
        """Whether the server is there, and takes the key."""
        try:
            self.sync.with_options(timeout=_LOOK_TIMEOUT_S).models.list()
        except self._openai.APIError:
            return False
        return True

    def is_lost(self, error: Exception) -> bool:
        """Whether an error says that the server is not there."""
        return isinstance(error, self._openai.APIConnectionError)
