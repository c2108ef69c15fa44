"""Worker side of `SampleAnswers`: the answers of a base model and of what was trained from it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openweights import OpenWeights
from openweights.errors import OpenWeightsError
from openweights.jobs.unsloth.runtime.job_log import set_up_logging

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def answers(name: str, location: str, params: dict[str, Any]) -> Iterator[Row]:
    """So many samples of each question, under the name of the model."""
    from openweights.generation.choose import generation_engine
    from openweights.generation.params import GenerationRequest, SamplingParams
    from openweights.models.forward import active_adapter
    from openweights.models.load import load_trained
    from openweights.models.templates.rendering import prompt_token_ids

    model, tokenizer = load_trained(location)
    engine = generation_engine("auto", model, tokenizer)
    sampling = SamplingParams(
        max_new_tokens=params["max_tokens"],
        temperature=params["temperature"],
        n=params["samples"],
        seed=params["seed"],
    )
    asked = params["questions"]
    requests = [
        GenerationRequest(
            prompt_token_ids(tokenizer, [{"role": "user", "content": question}]),
            sampling,
            active_adapter(model),
        )
        for question in asked
    ]
    for question, completions in zip(asked, engine.generate(requests), strict=True):
        for completion in completions:
            yield {"model": name, "question": question, "answer": completion.text}
    logger.info("%s: %d answers", name, len(asked) * params["samples"])


def main(job_id: str) -> None:
    """Sample, and leave `uploads/answers.jsonl`."""
    ow = OpenWeights()
    params = ow.jobs.retrieve(job_id).params["validated_params"]
    rows = list(answers("base", params["model"], params))
    for trained in params["jobs"]:
        ow.jobs.retrieve(trained).download(Path("trained", trained))
        rows += answers(trained, str(Path("trained", trained, "adapter")), params)
    Path("uploads").mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path("uploads", "answers.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    set_up_logging()
    try:
        main(sys.argv[1])
    except OpenWeightsError as error:
        logger.error("%s", error)
        sys.exit(1)
