"""Rows of self-distillation: rendered and tokenised examples, and their batches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.config.demonstrations import Showing, split_row
from openweights.jobs.unsloth.config.examples import SDFTExample, sdft_reader
from openweights.jobs.unsloth.config.file_rows import MadeSequence
from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import usable_rows
from openweights.jobs.unsloth.token_table import TokenTable
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.packing import row_numbers
from openweights.models.tokens import Collator, borders, pad_right


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


class SDFTRows(MadeSequence[SDFTExample]):
    """Rows that student and teacher can read. Of each its tokens are held, and where it stands.

    Args:
        rows: All rows.

    Attributes:
        tokens: Those of `SDFTExample`.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.tokens = TokenTable("prompt_ids", "teacher_prompt_ids", "demonstration_ids")
        self._rows = rows
        self._places = array("q")

    def append(self, place: int, example: SDFTExample) -> None:
        """What the row of an index is read as."""
        self._places.append(place)
        self.tokens.append({name: getattr(example, name) for name in self.tokens.columns})

    def made(self, at: int) -> SDFTExample:
        """A row as it is read."""
        messages, _ = split_row(self._rows[self._places[at]])
        return SDFTExample(**self.tokens[at], messages=messages)

    def __len__(self) -> int:
        return len(self._places)


def sdft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    showing: Showing | None = None,
) -> SDFTRows:
    """Render and tokenise rows, with the demonstrations where `showing` or else the config says.

    Those whose teacher prompt leaves no room for a completion are dropped and counted.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    reader, found = sdft_reader(config, tokenizer, showing), SDFTRows(rows)
    for at, example in usable_rows(rows, reader, name="training_file"):
        found.append(at, example)
    return found


def on_policy_dataset(examples: SDFTRows) -> Dataset:
    """The columns from which student and teacher prompts are batched."""
    return examples.tokens.dataset("prompt_ids", "teacher_prompt_ids")


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a right-padded batch without their padding."""
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]


def scoring_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    skip_tokens: int,
    pad_token_id: int,
    packed: bool,
) -> dict[str, Any]:
    """Prompt and completion as one row each, padded on the right or laid end to end.

    Left-padded rows give NaN gradients on CUDA.

    Returns:
        What `packing.last_hidden` reads, and `loss_mask` of the same shape, which marks the
        positions whose next-token distribution is scored. Row by row it marks the same completion
        tokens for student and teacher, so the scored positions of both correspond.
    """
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    scored = [
        [len(prompt) - 1 + skip_tokens <= at < len(row) - 1 for at in range(len(row))]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    if not packed:
        ids, mask = pad_right(rows, pad_token_id)
        loss_mask, _ = pad_right(scored, False)
        return {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask}
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[at for row in rows for at in range(len(row))]]),
        "loss_mask": torch.tensor([[is_scored for row in scored for is_scored in row]]),
        **borders([len(row) for row in rows]),
    }


def token_weights(loss_mask: Tensor, starts: Tensor | None, sequences: int) -> Tensor:
    """Weight of each scored token: 1 / (tokens of its sequence * `sequences`).

    In row order, shape (N,).

    Args:
        starts: Borders of packed rows.
    """
    rows, count = row_numbers(loss_mask, starts)
    per_row = rows.bincount(minlength=count)
    return 1.0 / (per_row[rows] * sequences)


def places_in_completions(loss_mask: Tensor, starts: Tensor | None) -> Tensor:
    """Which scored token of its sequence each one is, from 0; in row order, shape (N,).

    Args:
        starts: Borders of packed rows.
    """
    rows, count = row_numbers(loss_mask, starts)
    counts = rows.bincount(minlength=count)
    firsts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - firsts[rows]
