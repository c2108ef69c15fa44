"""Measures what a fine-tuned model has learnt, and how far it has moved from its base elsewhere.

Everything is greedy and in float32, so that measuring again gives the same numbers.
"""

# pyright: basic
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.generation.transformers_engine import TransformersEngine
from openweights.jobs.unsloth.config.demonstrations import Showing, split_row, teacher_messages
from openweights.models.forward import active_adapter
from openweights.models.templates.messages import Message

LEDGER_LINE = re.compile(r"[A-Z][a-z]+: \d+ [a-z]+ [a-z]+\.")


class Score(NamedTuple):
    """Shares of answers: those that are a ledger line, and those that are the right one."""

    format: float
    correct: float


class Question(NamedTuple):
    """A row of a dataset: what is asked, and the demonstration that answers it."""

    prompt: list[Message]
    answer: str


class BaseAnswer(NamedTuple):
    """What the base model answers to a general prompt.

    Attributes:
        prompt_ids, answer_ids: Tokens.
        logps: The base model's next-token log-probabilities over the answer; shape (C, V).
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    logps: Tensor


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of a `conversations` file."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Question(*split_row(row)) for row in rows[:limit]]


def read_prompts(path: Path, limit: int | None = None) -> list[list[Message]]:
    """The first `limit` rows of a `conversations` file whose rows end with a user turn."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines][:limit]


def score(answers: Sequence[str], questions: Sequence[Question]) -> Score:
    """How many answers have the format, and how many are the demonstration itself."""
    pairs = list(zip((answer.strip() for answer in answers), questions, strict=True))
    return Score(
        format=sum(bool(LEDGER_LINE.fullmatch(answer)) for answer, _ in pairs) / len(pairs),
        correct=sum(answer == question.answer for answer, question in pairs) / len(pairs),
    )


class ChatModel:
    """A base model and its tokenizer, which answers with or without an adapter on it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    @contextmanager
    def adapted(self, adapter: Path) -> Iterator[None]:
        """Answer with the LoRA adapter in `adapter` until the block ends."""
        base = self.model
        self.model = PeftModel.from_pretrained(base, str(adapter)).eval()
        try:
            yield
        finally:
            self.model = self.model.unload()

    def answers(self, prompts: Sequence[list[Message]], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations that end with a user turn."""
        return [one.text for one in self._completions(prompts, max_new_tokens)]

    def answer_ids(self, prompts: Sequence[list[Message]], max_new_tokens: int) -> list[list[int]]:
        """As `answers`, in tokens, up to the end token and with it."""
        return [one.token_ids for one in self._completions(prompts, max_new_tokens)]

    def _completions(
        self, prompts: Sequence[list[Message]], max_new_tokens: int
    ) -> list[Completion]:
        params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        adapter = active_adapter(self.model)
        requests = [
            GenerationRequest(self._prompt_ids(prompt), params, adapter) for prompt in prompts
        ]
        engine = TransformersEngine(self.model, self.tokenizer)
        return [own[0] for own in engine.generate(requests)]

    def base_answers(
        self, prompts: Sequence[list[Message]], max_new_tokens: int
    ) -> list[BaseAnswer]:
        """The answers of this model, with its distribution over each of their tokens."""
        found: list[BaseAnswer] = []
        for prompt, answer in zip(prompts, self.answer_ids(prompts, max_new_tokens), strict=True):
            ids = self._prompt_ids(prompt)
            found.append(BaseAnswer(ids, answer, self._logps(ids, answer)))
        return found

    def kl_from_base(self, answers: Sequence[BaseAnswer]) -> float:
        """Mean KL(base || this model) per token of the base's answers, in nats."""
        total, count = 0.0, 0
        for answer in answers:
            logps = self._logps(answer.prompt_ids, answer.answer_ids)
            total += float((answer.logps.exp() * (answer.logps - logps)).sum())
            count += len(answer.answer_ids)
        return total / count

    @torch.no_grad()
    def _logps(self, prompt_ids: list[int], answer_ids: list[int]) -> Tensor:
        ids = torch.tensor([prompt_ids + answer_ids])
        logits = self.model(input_ids=ids, use_cache=False).logits[0]  # (T, V)
        return logits[len(prompt_ids) - 1 : -1].float().log_softmax(-1)  # (C, V)

    def _prompt_ids(self, prompt: list[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def teacher_gate(
    chat: ChatModel,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    say: Callable[[str], None],
) -> tuple[Score, Score]:
    """The base model's score without and with the demonstration in its conversation.

    Self-distillation can teach only what the second has and the first lacks.

    Args:
        say: Told what is answered, before it is, and what it was worth.
    """
    shown = [
        teacher_messages(question.prompt, question.answer, showing=Showing("turns"))
        for question in questions
    ]
    plain = [question.prompt for question in questions]
    found: list[Score] = []
    for label, prompts in (("without it", plain), ("with it", shown)):
        say(f"  {label}: answering {len(prompts)} training orders …")
        found.append(score(chat.answers(prompts, max_new_tokens), questions))
        say(f"  {label}: ledger line {found[-1].format:.2f}  correct {found[-1].correct:.2f}")
    return found[0], found[1]
