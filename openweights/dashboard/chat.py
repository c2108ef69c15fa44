"""Answers of models, for the page and for OpenAI's client.

They are passed on from `ow.chat`, which deploys a model when it is first asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from openweights.client import OpenWeights
from openweights.dashboard.http import json_body, refusal
from openweights.errors import InvalidInputError, OpenWeightsError


async def chat_completions(request: Request) -> Response:
    """A chat completion in OpenAI's format, whole or streamed."""
    client, body = cast("OpenWeights", request.state.client), await json_body(request)
    for name in ("model", "messages"):
        if not body.get(name):
            raise InvalidInputError(f"{name}: is missing")
    try:
        answer = await run_in_threadpool(_ask, client, body)
    except OpenWeightsError:
        raise
    except Exception as error:  # noqa: BLE001 - what the model's server said, with its status
        return refusal(request, getattr(error, "status_code", 502), str(error))
    if not body.get("stream"):
        return JSONResponse(answer.model_dump(mode="json"))
    return StreamingResponse(_events(answer), media_type="text/event-stream")


def _ask(client: OpenWeights, body: Mapping[str, Any]) -> Any:
    return client.chat.completions.create(**body)


def _events(chunks: Any) -> Iterator[str]:
    """Closes the stream to the model when the reader goes away, so that its row is freed."""
    try:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk.model_dump(mode='json'))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        chunks.close()
