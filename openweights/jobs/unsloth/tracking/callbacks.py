"""What is followed while a model trains: log-probabilities of conversations, and choices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.client.questions import Question
from openweights.events import MultipleChoice
from openweights.jobs.unsloth.runtime.reporting import Reporter, log_rows
from openweights.jobs.unsloth.tracking.logprob_rows import ScoredRow, score_rows
from openweights.jobs.unsloth.tracking.multiple_choice import ask, choices_in
from openweights.jobs.unsloth.tracking.schedule import ScheduledCallback
from openweights.jobs.unsloth.validate import MultipleChoiceCallback

logger = logging.getLogger(__name__)


class LogProbTracker(ScheduledCallback):
    """Follows the log-probabilities of a set of conversations.

    Its events are `LogProbs` with the mean loss under the set's name; where messages have blocks
    `BlockwiseLogProbs`, and `BlockLogProbs` for each block with a tag.

    Args:
        name: Of the set.
        schedule: As of `is_due`.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[ScoredRow],
        tokenizer: PreTrainedTokenizerBase,
        reporter: Reporter,
        *,
        schedule: int | str,
        batch_size: int,
    ) -> None:
        super().__init__(schedule, f"scoring {name}", reporter.log, of=len(rows), unit="rows")
        self._name = name
        self._rows = rows
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._batch_size = batch_size

    def measure(self, model: Any, step: int) -> None:
        scores = score_rows(model, self._tokenizer, self._rows, batch_size=self._batch_size)
        event = scores.summary(self._name, step=step, tag=self._name)
        log_rows(self._reporter, event, scores.rows, folder="logprobs")
        for block in scores.block_events(self._name, step):
            self._reporter.log(block)
        if scores.loss is not None:
            logger.info("step %d: loss of %s %.4f", step, self._name, scores.loss)


class MultipleChoiceTracker(ScheduledCallback):
    """Asks questions with several answers.

    Its events are `MultipleChoice`.
    """

    def __init__(
        self,
        settings: MultipleChoiceCallback,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        reporter: Reporter,
    ) -> None:
        doing, of = f"asking questions ({settings.tag})", choices_in(questions)
        super().__init__(settings.eval_steps, doing, reporter.log, of=of, unit="choices")
        self._settings = settings
        self._questions = questions
        self._tokenizer = tokenizer
        self._reporter = reporter

    def measure(self, model: Any, step: int) -> None:
        size, tag = self._settings.batch_size, self._settings.tag
        answers = ask(model, self._tokenizer, self._questions, batch_size=size)
        event = MultipleChoice(step=step, tag=tag, **answers.summary())
        log_rows(self._reporter, event.data(), answers.rows, folder="multiple_choice")
        logger.info("step %d: %s accuracy %.3f", step, tag, event.accuracy)
