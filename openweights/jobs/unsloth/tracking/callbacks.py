"""What is followed while a model trains: log-probabilities of conversations, and choices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.client.questions import Question
from openweights.jobs.unsloth.runtime.reporting import Reporter, log_rows
from openweights.jobs.unsloth.tracking.logprob_rows import ScoredRow, score_rows
from openweights.jobs.unsloth.tracking.multiple_choice import ask
from openweights.jobs.unsloth.tracking.schedule import ScheduledCallback
from openweights.jobs.unsloth.validate import MultipleChoiceCallback

logger = logging.getLogger(__name__)


class LogProbTracker(ScheduledCallback):
    """Follows the log-probabilities of a set of conversations.

    Its events are `{type: "logprobs", <name>: mean loss, step, tag, path, file}`. Where messages
    have blocks, the type is `logprobs_blockwise`, and each block with a tag has an event of its
    own, `{type: "logprob_block", source: <name>, step, tag, row, message, block, text, logprobs}`.

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
        super().__init__(schedule)
        self._name = name
        self._rows = rows
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._batch_size = batch_size

    def measure(self, model: Any, step: int) -> None:
        """See `ScheduledCallback`."""
        found = score_rows(model, self._tokenizer, self._rows, batch_size=self._batch_size)
        kind = "logprobs_blockwise" if found.blockwise else "logprobs"
        event = {"type": kind, self._name: found.loss, "step": step, "tag": self._name}
        log_rows(self._reporter, event, found.rows, folder="logprobs")
        for block in found.blocks:
            own = {"type": "logprob_block", "source": self._name, "step": step}
            self._reporter.log({**own, **block})
        logger.info("step %d: loss of %s %.4f", step, self._name, found.loss)


class MultipleChoiceTracker(ScheduledCallback):
    """Asks questions with several answers.

    Its events are `{type: "multiple_choice", step, tag, accuracy, probability, questions, path,
    file}`, where `probability` is the mean of the right choice's.
    """

    def __init__(
        self,
        settings: MultipleChoiceCallback,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        reporter: Reporter,
    ) -> None:
        super().__init__(settings.eval_steps)
        self._settings = settings
        self._questions = questions
        self._tokenizer = tokenizer
        self._reporter = reporter

    def measure(self, model: Any, step: int) -> None:
        """See `ScheduledCallback`."""
        size, tag = self._settings.batch_size, self._settings.tag
        answers = ask(model, self._tokenizer, self._questions, batch_size=size)
        event = {"type": "multiple_choice", "step": step, "tag": tag, **answers.summary()}
        log_rows(self._reporter, event, answers.rows, folder="multiple_choice")
        logger.info("step %d: %s accuracy %.3f", step, tag, event["accuracy"])
