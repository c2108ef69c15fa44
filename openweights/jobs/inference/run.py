"""Worker side of an inference job: `python -m openweights.jobs.inference.run JOB_ID`."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.client.event_json import json_text
from openweights.client.watching.progress import figure
from openweights.errors import ConfigError, DatasetError
from openweights.events import Stage, Started
from openweights.generation.params import Completion, Delta, GenerationRequest, joined
from openweights.generation.prompts import token_logprobs
from openweights.jobs.inference import InferenceConfig
from openweights.jobs.inference.parts import Parts, Result
from openweights.jobs.inference.rows import Row, row_prompt, row_sampling
from openweights.jobs.model_source import fetch_model, stages
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.jobs.unsloth.runtime.job_log import run_job
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED
from openweights.models.names import model_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openweights import OpenWeights
    from openweights.generation.engine import GenerationEngine

logger = logging.getLogger(__name__)

TAG = "inference"
RESULT = Path("completions.jsonl")
AHEAD = 256  # requests for each process of an engine; it works on as many of them as it can
REPORT_S = 2.0

# Row, its result once it is whole, and tokens that are new since the last of these.
Answers = Iterator[tuple[int, Result | None, int]]


def answer_job(job_id: str) -> int:
    """Answer all rows of a job that are not answered yet, and store the result."""
    from openweights import OpenWeights

    ow = OpenWeights()
    job = ow.jobs.retrieve(job_id)
    config = InferenceConfig(**job.params["validated_params"])
    rows = read_rows(ow.files.download(config.input_file_id, Path("data") / "input.jsonl"))
    parts = Parts(ow, ow.run)
    left = [index for index in range(len(rows)) if index not in parts.results]
    ow.run.log(Started(max_steps=len(rows), from_step=len(rows) - len(left), unit="row").data())
    logger.info(
        "%d rows, %d of them answered already; answers of at most %d tokens (max_tokens)",
        *(len(rows), len(rows) - len(left), config.max_tokens),
    )
    if left:
        answers = _open(ow, config, rows, left, has_company=job.record.is_question)
        if not keep_answers(answers, parts, ow, len(rows)):
            return EXIT_TERMINATED
    _store_result(ow, rows, parts)
    return 0


def _open(
    ow: OpenWeights,
    config: InferenceConfig,
    rows: Sequence[Row],
    left: Sequence[int],
    *,
    has_company: bool,
) -> Answers:
    """What a model answers.

    Args:
        has_company: Another job may run on this machine, whose memory is not ours to take.
    """
    if model_reference(config.model).kind == "openai":
        from openweights.jobs.inference.openai_models import openai_answers

        return openai_answers(ow, config, rows, left)
    from openweights.jobs.engine import open_engine

    ow.run.log(Stage(doing="loading the model").data())
    source = fetch_model(ow, config.model, Path("model"), stages(logger, ow.run.log))
    if has_company:
        from openweights.models.memory import ROOM, wait_for_memory, weight_bytes

        wait_for_memory(source.name, int(ROOM * weight_bytes(Path(source.base))))
    opened = open_engine(source, config.engine, config.chat_template, in_4bit=config.in_4bit)
    return engine_answers(opened.engine, opened.tokenizer, opened.adapter, config, rows, left)


def engine_answers(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None,
    config: InferenceConfig,
    rows: Sequence[Row],
    left: Sequence[int],
    field: str = "input_file_id",
) -> Answers:
    """What a model answers to the rows `left`: each as soon as all its completions are there, and
    before that how it grows.

    Args:
        field: Where rows come from, for what is said of one that cannot be answered.
    """
    requests = iter(_requests(engine, tokenizer, adapter, config, rows, left, field))
    grown: dict[str, list[list[Delta]]] = {}
    while True:
        for request in islice(requests, AHEAD * engine.replicas - len(grown)):
            engine.submit(request)
            grown[request.id] = [[] for _ in range(request.params.n)]
        if not grown:
            return
        finished: list[str] = []
        for delta in engine.step():
            samples = grown[delta.request_id]
            samples[delta.sample].append(delta)
            yield int(delta.request_id), None, len(delta.token_ids)
            if all(own and own[-1].finish_reason for own in samples):
                finished.append(delta.request_id)
        for name in finished:
            completions = [joined(own) for own in grown.pop(name)]
            yield int(name), _result(completions, tokenizer, config), 0


def _requests(
    engine: GenerationEngine,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None,
    config: InferenceConfig,
    rows: Sequence[Row],
    left: Sequence[int],
    field: str,
) -> list[GenerationRequest]:
    """All of them, before the first is answered: a row that cannot be is said at once."""
    limit = min(config.max_model_len, engine.max_length)
    requests: list[GenerationRequest] = []
    for index in left:
        try:
            prompt = row_prompt(rows[index], tokenizer, config)
        except ConfigError:
            raise
        except ValueError as error:
            raise DatasetError(f"{field}: row {index + 1}: {error}") from None
        if not 0 < len(prompt) < limit:
            what = f"has {len(prompt)} tokens, and the context {limit}; shorten it"
            what = what if prompt else "is empty; give it text"
            raise DatasetError(f"{field}: row {index + 1}: the prompt {what}")
        params = row_sampling(rows[index], index, config, limit - len(prompt))
        requests.append(GenerationRequest(prompt, params, adapter, str(index)))
    return requests


def _result(
    completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, config: InferenceConfig
) -> Result:
    texts: list[Any] = [completion.text for completion in completions]
    values: list[Any] = [None] * len(completions)
    if config.logprobs is not None:
        values = [token_logprobs(tokenizer, completion) for completion in completions]
    if config.n_completions_per_prompt == 1:
        return {"completion": texts[0], "logprobs": values[0]}
    return {"completion": texts, "logprobs": values if config.logprobs is not None else None}


def keep_answers(answers: Answers, parts: Parts, ow: OpenWeights, total: int) -> bool:
    """Keep the answers as they come; False when the job was told to stop before the last one."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    started_at = time.monotonic()
    told_at = started_at - REPORT_S  # the first answer is told of at once
    tokens, reached_s = 0, 0.0
    for index, result, count in answers:
        tokens += count
        now = time.monotonic()
        if result is not None:
            parts.add(index, result)
            reached_s = now - started_at
        if now - told_at >= REPORT_S or (result is not None and len(parts.results) == total):
            rate = tokens / max(now - started_at, 1e-9)
            _tell(ow, len(parts.results), total, tokens, rate, reached_s)
            told_at = now
        if stopped:
            break
    signal.signal(signal.SIGTERM, before)
    if len(parts.results) == total:
        return True
    parts.save()
    ow.run.flush()
    return False


def _tell(
    ow: OpenWeights, done: int, total: int, tokens: int, rate: float, reached_s: float
) -> None:
    if not done:
        ow.run.log(Stage(doing="answering").data())
    told = {"step": done, "tag": TAG, "total": total, "tokens": tokens}
    if reached_s:
        told["elapsed_s"] = round(reached_s, 3)
    ow.run.log({**told, "tokens_per_s": round(rate, 1)})
    logger.info("%d of %d rows, %d tokens, %s tokens/s", done, total, tokens, figure(rate))


def _store_result(ow: OpenWeights, rows: Sequence[Row], parts: Parts) -> None:
    with RESULT.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            file.write(json_text({**row, **parts.results[index]}, ensure_ascii=False) + "\n")
    stored = ow.files.create(RESULT, "result")["id"]
    # The last event with a file, so that `job.outputs["file"]` is the result.
    ow.run.log({"file": stored, "path": RESULT.name})
    ow.run.flush()
    logger.info("done: %d rows in %s", len(rows), stored)


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            answer_job,
            module="openweights.jobs.inference.run",
            failure="inference failed",
        )
    )
