"""Answers of models, for the page and for OpenAI's client.

They are passed on from `ow.chat`, which deploys a model when it is first asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from openweights.client import OpenWeights
from openweights.dashboard.http import json_body, refuse_local_files
from openweights.errors import InvalidInputError


async def chat_completions(request: Request) -> Response:
    """A chat completion in OpenAI's format, whole or streamed."""
    client = cast("OpenWeights", request.state.client)
    return await _answer(request, client.sync_chat.completions.create, "messages")


async def text_completions(request: Request) -> Response:
    """The same of a text that is gone on with."""
    client = cast("OpenWeights", request.state.client)
    return await _answer(request, client.completions.create, "prompt")


async def _answer(request: Request, ask: Callable[..., Any], field: str) -> Response:
    body = await json_body(request)
    for name in ("model", field):
        if not body.get(name):
            raise InvalidInputError(f"{name}: is missing")
    if body.get("cache"):
        raise InvalidInputError("cache: is no parameter of OpenAI's API")
    refuse_local_files(cast("OpenWeights", request.state.client), body["model"], "model")
    answer = await run_in_threadpool(lambda: ask(**body))
    if not body.get("stream"):
        return JSONResponse(answer.model_dump(mode="json"))
    return StreamingResponse(_events(answer), media_type="text/event-stream")


def _events(chunks: Any) -> Iterator[str]:
    """Closes the stream to the model when the reader goes away, so that its row is freed."""
    try:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk.model_dump(mode='json'))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        chunks.close()
