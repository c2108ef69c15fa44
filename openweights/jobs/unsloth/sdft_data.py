"""Rows of self-distillation: rendered and tokenised examples, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.demonstrations import Showing
from openweights.jobs.unsloth.config.rendering import sdft_texts
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import Fitting, encode_rows
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.tokens import Collator, pad_right


@dataclass(frozen=True, slots=True)
class SDFTExample:
    """One training row, rendered and tokenised.

    Attributes:
        prompt_ids: What the student continues.
        teacher_prompt_ids: What the teacher continues.
        demonstration_ids: The demonstration as a completion, for the teacher gate.
    """

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    demonstration_ids: list[int]


class SDFTDataCollator:
    """Batches of on-policy rows, or of rows with labels, as an evaluation set has.

    On-policy: `prompt_ids`, `teacher_prompt_ids` and their masks, shape (B, T), padded on the
    right. Otherwise: `input_ids`, `attention_mask`, `labels`, shape (B, T), padded on the right,
    labels with -100.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows that all have the same columns."""
        if "prompt_ids" not in rows[0]:
            return Collator(self._pad_token_id)(rows)
        batch: dict[str, Tensor] = {}
        for name in ("prompt", "teacher_prompt"):
            ids, mask = pad_right([row[f"{name}_ids"] for row in rows], self._pad_token_id)
            batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return batch


def sdft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    showing: Showing | None = None,
) -> list[SDFTExample]:
    """Render and tokenise rows, with the demonstrations where `showing` or else the config says.

    Those whose teacher prompt leaves no room for a completion are dropped and counted.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """

    def encode(row: Row) -> tuple[SDFTExample, frozenset[str]]:
        return encode_example(row, config, tokenizer, showing)

    fitting = Fitting[SDFTExample](
        config.max_seq_length - config.sdft_max_new_tokens,
        length=lambda example: len(example.teacher_prompt_ids),
        room=config.sdft_max_new_tokens,
    )
    kept = encode_rows(rows, encode, fitting, name="training_file")
    return [example for _, example in kept]


def encode_example(
    row: Row,
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    showing: Showing | None = None,
) -> tuple[SDFTExample, frozenset[str]]:
    """A row with what student and teacher read, and notes that are worth saying once.

    Raises:
        ValueError: The row cannot be used.
    """
    student, teacher, demonstration = sdft_texts(row, config, tokenizer, showing)
    ids = [
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (student.text, teacher.text, demonstration)
    ]
    return SDFTExample(*ids), student.notes | teacher.notes


def on_policy_dataset(examples: Sequence[SDFTExample]) -> Dataset:
    """The columns from which student and teacher prompts are batched."""
    return Dataset.from_list(
        [{"prompt_ids": e.prompt_ids, "teacher_prompt_ids": e.teacher_prompt_ids} for e in examples]
    )


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a right-padded batch without their padding."""
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]


def token_weights(loss_mask: Tensor, sequences: int) -> Tensor:
    """Weight of each scored token: 1 / (tokens of its sequence * `sequences`).

    Packed in row order, shape (N,).
    """
    per_row = loss_mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    return (1.0 / (per_row * sequences)).expand_as(loss_mask)[loss_mask]
