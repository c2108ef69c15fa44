"""How each loss reads the rows of its files. No torch here: what is left of rows, and of how many,
is known before a job is submitted, wherever the model's tokenizer is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openweights.client.questions import parse_question
from openweights.jobs.unsloth.config.demonstrations import Showing, split_row
from openweights.jobs.unsloth.config.encoding import Encoded, Reader, encode_row, encode_text
from openweights.jobs.unsloth.config.fields import DatasetRef, TrainingFields
from openweights.jobs.unsloth.config.grpo_fields import split_gold
from openweights.jobs.unsloth.config.rendering import (
    answer_texts,
    prompt_text,
    question_text,
    sdft_texts,
)
from openweights.jobs.unsloth.config.rows import PREFERENCE_LOSSES, Row
from openweights.models.reading import token_ids
from openweights.models.templates.messages import Message
from openweights.models.templates.rendering import rendered_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SDFTExample:
    """One training row, rendered and tokenised.

    Attributes:
        prompt_ids: What the student continues.
        teacher_prompt_ids: What the teacher continues.
        demonstration_ids: The demonstration as a completion, for the teacher gate.
        messages: What the student is asked.
    """

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    demonstration_ids: list[int]
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is answered.

    Attributes:
        ids: Rendered and tokenised.
        gold: The gold response, where there is one.
    """

    messages: list[Message]
    ids: list[int]
    gold: str | None


def reader_of(
    ref: DatasetRef,
    config: TrainingFields,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[str],
    showing: Showing | None = None,
) -> Reader[Any]:
    """How the rows of a file of a job are read.

    Args:
        ends: Texts of the tokens that end a turn.
        showing: Where the teacher of sdft reads the demonstrations; None for where the config says.
    """
    match ref.field:
        case "mcq_callbacks":
            return question_reader(tokenizer)
        case "sampling_callbacks":
            callback = (config.sampling_callbacks or [])[ref.key]  # type: ignore[index]
            return prompt_reader(
                tokenizer, (f"{ref.field}[{ref.key}].max_tokens", callback.max_tokens)
            )
        case "logp_callback_datasets":
            return scored_reader(tokenizer, ends, limit=config.max_seq_length)
        case _ if config.loss in PREFERENCE_LOSSES:
            return pair_reader(config, tokenizer, ends)
        case _ if config.loss == "grpo":
            return grpo_reader(config, tokenizer)
        case "training_file" if config.loss == "sdft":
            return sdft_reader(config, tokenizer, showing)
        case _:
            return sft_reader(config, tokenizer, ends)


def sft_reader(
    config: TrainingFields, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]
) -> Reader[Encoded]:
    """Rows of at most `max_seq_length` tokens. A longer one loses its end; when nothing to learn is
    left of it, it is dropped, except for a row whose weights say so.
    """

    def encode(row: Row) -> tuple[Encoded, frozenset[str]]:
        encoded = encode_row(row, tokenizer, train_on=config.train_on, ends=ends)
        return encoded, encoded.notes

    return Reader(
        encode,
        length=_length,
        limit=config.max_seq_length,
        cut=Encoded.cut,
        is_useful=lambda encoded: encoded.is_useful,
        useless="nothing to learn is left",
    )


def pair_reader(
    config: TrainingFields, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]
) -> Reader[list[Encoded]]:
    """Pairs of conversations of at most `max_seq_length` tokens. A longer one loses its end; a pair
    with nothing to compare left is dropped: an answer without tokens, or two equal ones.
    """

    def encode(row: Row) -> tuple[list[Encoded], frozenset[str]]:
        pair = [encode_text(text, tokenizer) for text in answer_texts(row, tokenizer, ends)]
        return pair, pair[0].notes | pair[1].notes

    def cut(pair: list[Encoded], limit: int) -> None:
        for encoded in pair:
            encoded.cut(limit)

    return Reader(
        encode,
        length=lambda pair: max(map(_length, pair)),
        limit=config.max_seq_length,
        cut=cut,
        is_useful=_is_comparable,
        useless="nothing to compare is left",
    )


def _is_comparable(pair: Sequence[Encoded]) -> bool:
    return all(side.teaches for side in pair) and pair[0].input_ids != pair[1].input_ids


def sdft_reader(
    config: TrainingFields, tokenizer: PreTrainedTokenizerBase, showing: Showing | None = None
) -> Reader[SDFTExample]:
    """Rows whose teacher's prompt leaves room for a completion; others are dropped."""
    answer = config.sdft_max_new_tokens
    return Reader(
        lambda row: sdft_example(row, config, tokenizer, showing),
        length=lambda example: len(example.teacher_prompt_ids),
        limit=config.max_seq_length - answer,
        answer=("sdft_max_new_tokens", answer),
    )


def sdft_example(
    row: Row,
    config: TrainingFields,
    tokenizer: PreTrainedTokenizerBase,
    showing: Showing | None = None,
) -> tuple[SDFTExample, frozenset[str]]:
    """A row with what student and teacher read, and notes that are worth saying once.

    Raises:
        ValueError: The row cannot be used.
    """
    student, teacher, demonstration = sdft_texts(row, config, tokenizer, showing)
    ids = [token_ids(tokenizer, text) for text in (student.text, teacher.text, demonstration)]
    return SDFTExample(*ids, messages=split_row(row)[0]), student.notes | teacher.notes


def grpo_reader(config: TrainingFields, tokenizer: PreTrainedTokenizerBase) -> Reader[Prompt]:
    """Rows whose prompt leaves room for a completion; others are dropped."""

    def encode(row: Row) -> tuple[Prompt, frozenset[str]]:
        messages, gold = split_gold(row)
        rendered = rendered_prompt(tokenizer, messages, tools=row.get("tools"))
        return Prompt(messages, token_ids(tokenizer, rendered.text), gold), rendered.notes

    answer = config.grpo_max_completion_length
    return Reader(
        encode,
        length=lambda prompt: len(prompt.ids),
        limit=config.max_seq_length - answer,
        answer=("grpo_max_completion_length", answer),
    )


def prompt_reader(
    tokenizer: PreTrainedTokenizerBase, answer: tuple[str, int] | None = None
) -> Reader[list[int]]:
    """Conversations that are answered without their last answer, of whatever length.

    Args:
        answer: As of `Reader`.
    """

    def encode(row: Row) -> tuple[list[int], frozenset[str]]:
        rendered = prompt_text(row, tokenizer)
        return token_ids(tokenizer, rendered.text), rendered.notes

    return Reader(encode, length=len, answer=answer)


def scored_reader(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], *, limit: int | None
) -> Reader[Encoded]:
    """Conversations whose answers are scored; a longer one loses its end, and stays."""

    def encode(row: Row) -> tuple[Encoded, frozenset[str]]:
        encoded = encode_row(row, tokenizer, train_on="responses", ends=ends)
        return encoded, encoded.notes

    return Reader(encode, length=_length, limit=limit, cut=Encoded.cut)


def question_reader(tokenizer: PreTrainedTokenizerBase) -> Reader[list[int]]:
    """Questions with choices, as they are asked; they are never cut."""

    def encode(row: Row) -> tuple[list[int], frozenset[str]]:
        asked = question_text(parse_question(row), tokenizer)
        return token_ids(tokenizer, asked.text), frozenset()

    return Reader(encode, length=len)


def _length(encoded: Encoded) -> int:
    return len(encoded.input_ids)
