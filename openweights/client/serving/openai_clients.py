"""The OpenAI clients with which models are asked: the only importer of `openai` on this side."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import ConfigurationError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_TIMEOUT_S = 600.0
_LOOK_TIMEOUT_S = 10.0


def is_refusal(error: Exception) -> bool:
    """Whether it is what a server has answered instead of what it was asked for."""
    return isinstance(getattr(error, "status_code", None), int)


def said_by_server(error: Exception) -> str:
    """What a server has said of an error, without its status and the JSON around it."""
    body: object = getattr(error, "body", None)
    said = cast("Mapping[str, object]", body).get("message") if isinstance(body, Mapping) else None
    return said if isinstance(said, str) and said else str(error)


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
        try:
            import openai
        except ModuleNotFoundError:
            raise ConfigurationError(
                "asking a model needs the package openai: pip install openai"
            ) from None
        self._openai = openai
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
