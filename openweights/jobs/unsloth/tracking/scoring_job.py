"""Worker side of the jobs that score a dataset with a model and train nothing:
`python -m openweights.jobs.unsloth.tracking.scoring_job logprob|multiple_choice JOB_ID`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openweights.client.questions import parse_question
from openweights.client.results import write_table
from openweights.events import (
    MultipleChoice,
    Reproducibility,
    Stage,
)
from openweights.jobs.model_source import fetch_model, stages
from openweights.jobs.scoring import ScoringParams
from openweights.jobs.stage import counted_stage
from openweights.jobs.unsloth.config.file_rows import open_rows
from openweights.jobs.unsloth.runtime.job_log import exit_status, heard, set_up_logging
from openweights.jobs.unsloth.runtime.reporting import Reporter, StoreReporter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoringRun:
    """A job that is ready to score.

    Attributes:
        rows: Of the dataset.
    """

    params: ScoringParams
    model: Any
    tokenizer: Any
    rows: Sequence[dict[str, Any]]
    reporter: Reporter

    def log_result(
        self, event: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], name: str
    ) -> None:
        """Log an event with the rows as a file of that name."""
        path = write_table(rows, Path(name))
        self.reporter.log({**event, "path": name}, file=path)
        logger.info("done: %s", json.dumps(event))


def score_log_probs(job: ScoringRun) -> None:
    """Score the conversations and log the result."""
    from openweights.jobs.unsloth.tracking.logprob_rows import score_rows, scored_rows
    from openweights.models.tokens import eos_token_ids

    ends = eos_token_ids(job.model, job.tokenizer)
    longest = getattr(job.model.config.get_text_config(), "max_position_embeddings", None)
    rows = scored_rows(job.rows, job.tokenizer, ends=ends, limit=longest)
    with counted_stage(job.reporter.log, "scoring the rows", of=len(rows), unit="rows"):
        scores = score_rows(job.model, job.tokenizer, rows, batch_size=job.params.batch_size)
    job.log_result(scores.summary("loss"), scores.rows, "logprobs.jsonl")
    for block in scores.block_events(job.params.dataset):
        job.reporter.log(block)


def put_questions(job: ScoringRun) -> None:
    """Put the questions to the model and log the result."""
    from openweights.jobs.unsloth.tracking.multiple_choice import ask, choices_in

    questions, size = [parse_question(row) for row in job.rows], job.params.batch_size
    count = choices_in(questions)
    with counted_stage(job.reporter.log, "asking the questions", of=count, unit="choices"):
        answers = ask(job.model, job.tokenizer, questions, batch_size=size)
    event = MultipleChoice(**answers.summary())
    job.log_result(event.data(), answers.rows, "multiple_choice.jsonl")


KINDS = {"logprob": score_log_probs, "multiple_choice": put_questions}


def main(arguments: Sequence[str]) -> int:
    """Load what a job needs, and score; the exit status tells whether it went well."""
    set_up_logging()
    if len(arguments) != 2 or arguments[0] not in KINDS:  # noqa: PLR2004 - kind and job
        kinds = "|".join(KINDS)
        logger.error(
            "usage: python -m openweights.jobs.unsloth.tracking.scoring_job %s JOB_ID", kinds
        )
        return 2
    kind = KINDS[arguments[0]]
    return exit_status(lambda: heard(lambda: _run(arguments[1], kind)), "scoring failed")


def _run(job_id: str, act: Callable[[ScoringRun], None]) -> int:
    from openweights import OpenWeights

    ow = OpenWeights()
    params = ScoringParams(**ow.jobs.retrieve(job_id).params["validated_params"])
    reporter = StoreReporter(ow, ow.run)
    reporter.log(Stage(doing="loading the model").data())  # torch is imported, to begin with
    from openweights.jobs.unsloth.runtime.record import environment, file_hash
    from openweights.models.load import load_trained

    data = reporter.fetch(params.dataset, Path("data") / "dataset.jsonl")
    record = {**environment(), "params": params.model_dump(), "sha256": file_hash(data)}
    reporter.log(Reproducibility(record=record).data())
    source = fetch_model(ow, params.model, Path("model"), stages(logger, reporter.log))
    model, tokenizer = load_trained(
        str(source.adapter or source.base),
        source.base,
        chat_template=params.chat_template,
        template_options=params.template_options,
    )
    act(ScoringRun(params, model, tokenizer, open_rows(data), reporter))
    reporter.close(completed=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
