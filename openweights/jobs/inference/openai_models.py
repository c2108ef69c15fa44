"""Rows that a model of OpenAI answers: parallel requests, or their batch API.

A batch is asked for once: its id is an event, so that a job that lost its worker waits for the same
batch and pays once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI, OpenAI, OpenAIError

from openweights.errors import ConfigurationError, JobFailedError
from openweights.events import Batch
from openweights.models.names import model_reference
from openweights.models.templates.messages import flat_text

if TYPE_CHECKING:
    from openweights import OpenWeights
    from openweights.jobs.inference.config import InferenceConfig
    from openweights.jobs.inference.rows import Row

logger = logging.getLogger(__name__)

Answer = tuple[int, dict[str, Any], int]

PARALLEL = 20
RETRIES = 8  # of the client, which waits longer each time, or as long as the service says
FIRST_POLL_S, LONGEST_POLL_S = 1.0, 60.0
ENDPOINT = "/v1/chat/completions"


def openai_answers(
    ow: OpenWeights, config: InferenceConfig, rows: Sequence[Row], left: Sequence[int]
) -> Iterator[Answer]:
    """What the model answers to the rows `left`, as it comes.

    Raises:
        ConfigurationError: There is no key.
        JobFailedError: The service refuses; its own words.
    """
    if not ow.settings.openai_api_key:
        raise ConfigurationError(
            "OPENAI_API_KEY is not set where the job runs; set it, or `ow env import` it"
        )
    bodies = {index: _body(rows[index], index, config) for index in left}
    try:
        yield from _batch(ow, bodies, config) if config.use_batch else _parallel(bodies, config)
    except OpenAIError as error:
        raise JobFailedError(f"OpenAI: {error}") from error


def _body(row: Row, index: int, config: InferenceConfig) -> dict[str, Any]:
    """One request of the chat API."""
    messages = [{**m, "content": flat_text(m["content"])} for m in row.get("messages") or ()]
    messages = messages or [{"role": "user", "content": row["text"]}]
    if config.prefill:
        messages.append({"role": "assistant", "content": config.prefill})
    given, temperature = row.get("max_tokens"), row.get("temperature")
    body: dict[str, Any] = {
        "model": model_reference(config.model).name,
        "messages": messages,
        "max_completion_tokens": config.max_tokens if given is None else given,
        "temperature": config.temperature if temperature is None else temperature,
        "top_p": config.top_p,
        "n": config.n_completions_per_prompt,
        "seed": (config.seed + index) % 2**31,
    }
    if config.stop:
        body["stop"] = config.stop
    if config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    return body


def _answer(index: int, response: dict[str, Any], config: InferenceConfig) -> Answer:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    texts = [choice["message"].get("content") or "" for choice in choices]
    values = [(choice.get("logprobs") or {}).get("content") for choice in choices]
    tokens = (response.get("usage") or {}).get("completion_tokens", 0)
    if config.n_completions_per_prompt == 1:
        return index, {"completion": texts[0], "logprobs": values[0]}, tokens
    asked = config.logprobs is not None
    return index, {"completion": texts, "logprobs": values if asked else None}, tokens


# ---- parallel requests ---------------------------------------------------------------------------


def _parallel(bodies: dict[int, dict[str, Any]], config: InferenceConfig) -> Iterator[Answer]:
    """Each answer as soon as it is there."""
    answers = _as_they_come(bodies, config)
    with asyncio.Runner() as runner:
        while (answer := runner.run(anext(answers, None))) is not None:  # type: ignore[arg-type]
            yield answer


async def _as_they_come(
    bodies: dict[int, dict[str, Any]], config: InferenceConfig
) -> AsyncIterator[Answer]:
    free = asyncio.Semaphore(PARALLEL)
    async with AsyncOpenAI(max_retries=RETRIES) as client:

        async def ask(index: int, body: dict[str, Any]) -> Answer:
            async with free:
                response = await client.chat.completions.create(**body)
            return _answer(index, response.model_dump(), config)

        tasks = [asyncio.create_task(ask(index, body)) for index, body in bodies.items()]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()


# ---- the batch API -------------------------------------------------------------------------------


def _batch(
    ow: OpenWeights, bodies: dict[int, dict[str, Any]], config: InferenceConfig
) -> Iterator[Answer]:
    with OpenAI(max_retries=RETRIES) as client:
        batch_id = _batch_of(ow, client) or _submit(ow, client, bodies)
        pause_s = FIRST_POLL_S
        while (batch := client.batches.retrieve(batch_id)).status not in _ENDED:
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_POLL_S)
        if batch.output_file_id is None:
            raise JobFailedError(f"OpenAI: the batch {batch_id} is {batch.status}: {batch.errors}")
        missing = set(bodies)
        for line in client.files.content(batch.output_file_id).content.splitlines():
            answer: dict[str, Any] = json.loads(line)
            index = int(answer["custom_id"])
            if index in missing and answer["response"]["status_code"] == 200:  # noqa: PLR2004 - HTTP
                missing.discard(index)
                yield _answer(index, answer["response"]["body"], config)
    if missing:
        raise JobFailedError(
            f"OpenAI: the batch {batch_id} is {batch.status}, and {len(missing)} rows have no "
            "answer; restart the job with use_batch=False"
        )


_LOST = frozenset({"failed", "expired", "cancelled"})
_ENDED = _LOST | {"completed"}


def _batch_of(ow: OpenWeights, client: OpenAI) -> str | None:
    """The batch that an earlier attempt has asked for, if it may still give answers."""
    events = ow.events.list(job_id=ow.run.job_id, type=Batch.type)
    if not events:
        return None
    batch_id = Batch.of(events[-1].data).batch
    return None if client.batches.retrieve(batch_id).status in _LOST else batch_id


def _submit(ow: OpenWeights, client: OpenAI, bodies: dict[int, dict[str, Any]]) -> str:
    lines = "".join(
        json.dumps({"custom_id": str(index), "method": "POST", "url": ENDPOINT, "body": body})
        + "\n"
        for index, body in bodies.items()
    )
    file = client.files.create(file=("input.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    ow.run.log(Batch(batch=batch.id).data())
    ow.run.flush()
    logger.info("asked for the batch %s", batch.id)
    return batch.id
