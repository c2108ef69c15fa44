"""An OpenAI-compatible server over a generation engine: models, chats and completions.

Every request but `/health` needs the key. Adapters are models of their own, and rows of different
adapters are computed together. A client that goes away frees its rows at once.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from openweights.errors import ConfigError, OpenWeightsError
from openweights.generation.engine_thread import EngineThread
from openweights.generation.openai_format import (
    ChatRequest,
    Choice,
    CompletionRequest,
    Responses,
    error_body,
    parse_chat,
    parse_completion,
)
from openweights.generation.params import Delta, GenerationRequest
from openweights.generation.prompts import chat_prompt_ids, text_prompt_ids
from openweights.models.tokens import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_BODY_BYTES = 32 << 20
_GONE = 499  # as nginx says it; nobody reads it


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that requests can name.

    Attributes:
        adapter: Its adapter in the engine; None for the base model.
        tokenizer: Renders its conversations.
    """

    adapter: str | None
    tokenizer: PreTrainedTokenizerBase


@dataclass
class ModelServer:
    """The server's state and its requests.

    Attributes:
        models: By the names that requests give; may change while it runs.
        max_length: Prompt and completion together, in tokens.
        api_key: What requests must bear.
    """

    engine: EngineThread
    models: dict[str, ServedModel]
    max_length: int
    api_key: str
    _started_at: int = field(default_factory=lambda: int(time.time()))
    _used_at: float = field(default_factory=time.monotonic)

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._list_models)),
            Route("/v1/models/{name:path}", self._guarded(self._show_model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completion), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def idle_s(self) -> float:
        """How long nobody has asked for anything."""
        return 0.0 if self.engine.requests else time.monotonic() - self._used_at

    # ---- what guards the endpoints

    def _guarded(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint, for those with the key, with errors as OpenAI's clients read them."""

        async def guarded(request: Request) -> Response:
            if not self._has_key(request):
                what = "the key is missing or wrong; give the deployment's own as api_key"
                return _error(401, what, "authentication_error", "invalid_api_key")
            self._used_at = time.monotonic()
            try:
                return await endpoint(request)
            except LookupError as error:
                return _error(404, str(error.args[0]), "invalid_request_error", "model_not_found")
            except ConfigError as error:
                return _error(400, str(error), "invalid_request_error")
            except OpenWeightsError as error:
                return _error(503, str(error), "server_error")
            except ClientDisconnect:
                return Response(status_code=_GONE)
            finally:
                self._used_at = time.monotonic()

        return guarded

    def _has_key(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        return scheme.lower() == "bearer" and right

    # ---- endpoints

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.models]})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._model(name)
        return JSONResponse(self._card(name))

    async def _chat(self, request: Request) -> Response:
        asked = parse_chat(await _body(request))
        model = self._model(asked.model)
        messages = [message.plain() for message in asked.messages]
        try:
            prompt = chat_prompt_ids(
                model.tokenizer, messages, options=asked.chat_template_kwargs or {}
            )
        except ValueError as error:
            raise ConfigError(f"messages: {error}") from None
        return await self._answer(request, asked, model, [prompt])

    async def _completion(self, request: Request) -> Response:
        asked = parse_completion(await _body(request))
        model = self._model(asked.model)
        try:
            prompts = [
                text_prompt_ids(model.tokenizer, prompt) if isinstance(prompt, str) else prompt
                for prompt in asked.prompts()
            ]
        except ValueError as error:
            raise ConfigError(f"prompt: {error}") from None
        return await self._answer(request, asked, model, prompts)

    def _model(self, name: str) -> ServedModel:
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            raise LookupError(f"model: {name!r} is not served here (there are: {known})")
        return found

    def _card(self, name: str) -> dict[str, Any]:
        adapter = self.models[name].adapter
        card = {"id": name, "object": "model", "created": self._started_at}
        root = next((n for n, model in self.models.items() if model.adapter is None), None)
        parent = root if adapter is not None else None
        return {**card, "owned_by": "openweights", "parent": parent}

    # ---- answers

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
    ) -> Response:
        requests = [self._generation(asked, model, prompt) for prompt in prompts]
        responses = Responses(asked, model.tokenizer, sum(map(len, prompts)), model.adapter)
        count = asked.n or 1
        choices = [Choice() for _ in range(count * len(prompts))]
        grown = _merged([self.engine.stream(one) for one in requests], count)

        async def begin() -> Response:
            # The first piece now: what the engine refuses is an error, not a broken stream.
            first = await anext(grown)
            events = _events(first, grown, responses, choices)
            return StreamingResponse(events, media_type="text/event-stream")

        async def collect() -> Response:
            async with aclosing(grown):
                async for index, delta in grown:
                    choices[index].deltas.append(delta)
            return JSONResponse(responses.whole(choices))

        return await _unless_gone(request, begin() if asked.stream else collect())

    def _generation(
        self, asked: ChatRequest | CompletionRequest, model: ServedModel, prompt: Sequence[int]
    ) -> GenerationRequest:
        room = self.max_length - len(prompt)
        if room < 1:
            raise ConfigError(
                f"messages: the prompt has {len(prompt)} tokens, and the context {self.max_length}"
                "; shorten it"
            )
        # An adapter may come with a tokenizer that ends turns as its base's does not.
        ends = dict.fromkeys((*self.engine.end_token_ids, *eos_token_ids(None, model.tokenizer)))
        return GenerationRequest(prompt, asked.sampling(room, tuple(ends)), model.adapter)


async def _body(request: Request) -> object:
    body = bytearray()
    async for part in request.stream():  # whose length its sender need not tell
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise ConfigError(f"body: has more than the {MOST_BODY_BYTES} bytes that are taken")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError("body: is no JSON; send one object") from None


def _error(status: int, message: str, kind: str, code: str | None = None) -> Response:
    return JSONResponse(error_body(message, kind, code), status_code=status)


async def _merged(
    streams: Sequence[AsyncIterator[Delta]], count: int
) -> AsyncGenerator[tuple[int, Delta]]:
    """Deltas of several requests with `count` samples each, by the index of their choice."""
    ready: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def drain(number: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async for delta in stream:
                ready.put_nowait((number * count + delta.sample, delta))
            ready.put_nowait((number, None))
        except OpenWeightsError as error:
            ready.put_nowait((number, error))

    tasks = [asyncio.create_task(drain(*item)) for item in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(
    first: tuple[int, Delta],
    grown: AsyncGenerator[tuple[int, Delta]],
    responses: Responses,
    choices: Sequence[Choice],
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""
    opened: set[int] = set()

    def pieces(index: int, delta: Delta) -> list[dict[str, Any]]:
        choices[index].deltas.append(delta)
        is_new = responses.is_chat and index not in opened
        opened.add(index)
        opening = [responses.first_chunk(index)] if is_new else []
        return [*opening, responses.chunk(index, delta)]

    async with aclosing(grown):
        for piece in pieces(*first):
            yield _event(piece)
        try:
            async for index, delta in grown:
                if delta.text or delta.finish_reason or delta.logprobs:
                    for piece in pieces(index, delta):
                        yield _event(piece)
                else:
                    choices[index].deltas.append(delta)
        except OpenWeightsError as error:
            yield _event(error_body(str(error), "server_error"))
            return
    options = responses.request.stream_options
    if options is not None and options.include_usage:
        yield _event(responses.usage_chunk(choices))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, which is canceled when its client goes away."""
    answer = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=_GONE)
        return answer.result()
    finally:
        for task in (answer, watch):
            task.cancel()
        await asyncio.gather(answer, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    # The body has been read: what comes now is the end of the connection.
    while (await request.receive())["type"] != "http.disconnect":
        pass
