"""`ow.multiple_choice`: questions with several answers, put to a model. Client-side."""

from __future__ import annotations

from typing import Any, ClassVar

from openweights.client.questions import parse_question
from openweights.jobs.scoring import ScoringJobs
from openweights.jobs.unsloth.config.rendering import question_text


class MultipleChoice(ScoringJobs):
    """Submits multiple-choice jobs: `ow.multiple_choice.create(model=…, dataset=…)`.

    The result is the event `{type: "multiple_choice", accuracy, probability, questions, file,
    path}` and its file, a row for each question.
    """

    id_covers_mounts: ClassVar[bool] = False
    purpose: ClassVar[str] = "multiple_choice"
    prefix: ClassVar[str] = "mcjob"
    kind: ClassVar[str] = "multiple_choice"

    def check_row(self, row: dict[str, Any]) -> None:
        parse_question(row)

    @staticmethod
    def render_row(row: dict[str, Any], tokenizer: Any) -> object:
        return question_text(parse_question(row), tokenizer)
