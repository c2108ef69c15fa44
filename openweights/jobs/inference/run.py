"""Worker side of an inference job: `python -m openweights.jobs.inference.run JOB_ID`."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openweights.client.event_json import json_text
from openweights.client.watching.progress import figure
from openweights.events import Stage, Started
from openweights.jobs.inference.answers import Answers, given_answers
from openweights.jobs.inference.config import InferenceConfig
from openweights.jobs.inference.parts import Parts
from openweights.jobs.inference.rows import Row
from openweights.jobs.unsloth.config.file_rows import open_rows
from openweights.jobs.unsloth.runtime.job_log import run_job
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

TAG = "inference"
RESULT = Path("completions.jsonl")
REPORT_S = 2.0


def answer_job(job_id: str) -> int:
    """Answer all rows of a job that are not answered yet, and store the result."""
    from openweights import OpenWeights

    ow = OpenWeights()
    job = ow.jobs.retrieve(job_id)
    config = InferenceConfig(**job.params["validated_params"])
    rows = open_rows(ow.files.download(config.input_file_id, Path("data") / "input.jsonl"))
    parts = Parts(ow, ow.run)
    total = len(rows) * len(config.models)
    left = [index for index in range(total) if index not in parts.results]
    unit = "answer" if config.other_models else "row"
    logger.info(
        "%d %ss, %d of them there already; answers of at most %d tokens (max_tokens)",
        *(total, unit, total - len(left), config.max_tokens),
    )
    asked = [config.of_model(model) for model in config.models]
    is_question = job.record.is_question
    answers = given_answers(ow, asked, rows, left, "input_file_id", has_company=is_question)
    if not keep_answers(answers, parts, ow, total, unit):
        return EXIT_TERMINATED
    _store_result(ow, config.models, rows, parts)
    return 0


def keep_answers(
    answers: Answers, parts: Parts, ow: OpenWeights, total: int, unit: str = "answer"
) -> bool:
    """Keep the answers as they come; False when the job was told to stop before the last one."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    next(answers, None)  # a model is loaded by then, which is no part of the time of an answer
    ow.run.log(Started(max_steps=total, from_step=len(parts.results), unit=unit).data())
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
    logger.info("%d of %d answers, %d tokens, %s tokens/s", done, total, tokens, figure(rate))


def _store_result(
    ow: OpenWeights, models: Sequence[str], rows: Sequence[Row], parts: Parts
) -> None:
    with RESULT.open("w", encoding="utf-8") as file:
        for place, model in enumerate(models):
            named = {"model": model} if len(models) > 1 else {}
            for index, row in enumerate(rows):
                told = {**row, **named, **parts.results[place * len(rows) + index]}
                file.write(json_text(told, ensure_ascii=False) + "\n")
    stored = ow.files.create(RESULT, "result")["id"]
    # The last event with a file, so that `job.outputs["file"]` is the result.
    ow.run.log({"file": stored, "path": RESULT.name})
    ow.run.flush()
    logger.info("done: %d rows in %s", len(rows) * len(models), stored)


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            answer_job,
            module="openweights.jobs.inference.run",
            failure="inference failed",
        )
    )
