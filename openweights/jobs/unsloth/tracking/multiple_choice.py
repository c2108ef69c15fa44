"""Questions with several answers: which one does the model find likeliest?

The question is rendered as the user's turn, and each choice scored as the assistant's answer to it,
by the mean log-probability of its tokens, so that length is no advantage. The probabilities of the
choices are the softmax of these means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.client.questions import Question
from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.config.rendering import question_text
from openweights.models.log_probs import mean_target_log_probs
from openweights.models.reading import token_ids


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answered.

    Attributes:
        rows: Of each question `question`, `choices`, `answer`, `logprobs` (mean per token),
            `probabilities`, and `correct`.
    """

    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """`accuracy`, `probability` (the mean of the right choice's), and `questions`."""
        count = len(self.rows)
        right = [row["probabilities"][row["answer"]] for row in self.rows]
        return {
            "accuracy": sum(row["correct"] for row in self.rows) / count,
            "probability": sum(right) / count,
            "questions": count,
        }


def choices_in(questions: Sequence[Question]) -> int:
    """How many are scored."""
    return sum(len(question.choices) for question in questions)


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int,
) -> Answers:
    """Score the choices of each question under the model's current weights.

    Args:
        batch_size: Choices in one forward.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    for number, question in enumerate(questions, start=1):
        try:
            texts = (question_text(question, tokenizer).text, *question.choices)
            prompt, *choices = (token_ids(tokenizer, text) for text in texts)
        except ConfigError:
            raise
        except ValueError as error:
            raise DatasetError(f"question {number}: {error}") from None
        pairs += [(prompt, choice) for choice in choices]
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    means = iter(mean_target_log_probs(model, pairs, pad, batch_size=batch_size))
    return Answers(
        [_row(question, [next(means) for _ in question.choices]) for question in questions]
    )


def _row(question: Question, means: list[float]) -> dict[str, Any]:
    return {
        "question": question.text,
        "choices": list(question.choices),
        "answer": question.answer,
        "logprobs": means,
        "probabilities": torch.tensor(means, dtype=torch.float64).softmax(-1).tolist(),
        "correct": means.index(max(means)) == question.answer,
    }
