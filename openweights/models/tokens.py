"""Tokens that every job handles alike: what ends a completion, what fills rows up, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from openweights.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Tokens that vocabularies keep for padding, in the order in which they are looked for.
PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
)


def eos_token_ids(
    model: PreTrainedModel | PeftModel | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    generation = getattr(model, "generation_config", None)
    known: list[int] = []
    for given in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        ids: Any = given
        known += [] if ids is None else [ids] if isinstance(ids, int) else ids
    return list(dict.fromkeys(known))


def set_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and configs one pad token, and the generation config every end token."""
    if tokenizer.eos_token is None:
        raise ConfigError("model: its tokenizer has no end token; choose a model that has one")
    tokenizer.padding_side = "right"
    ends = eos_token_ids(model, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_vocab()
        free = [t for t in PAD_CANDIDATES if t in vocabulary and vocabulary[t] not in ends]
        tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = ends


IGNORED = -100


def pad_right(rows: Sequence[Sequence[Any]], filler: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and attention mask of shape (B, T), padded on the right with `filler`."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@dataclass(slots=True)
class Collator:
    """Rows -> one batch.

    Padded on the right: a left-padded row has queries that attend to nothing, whose gradients are
    NaN on CUDA. With `packed` the rows are laid end to end instead, kept apart by position ids that
    start anew: the same rows in the same batch, without padding.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, torch.Tensor]:
        return self._pack(rows) if self.packed else self._pad(rows)

    def _pad(self, rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, torch.Tensor]:
        fillers = {"input_ids": self.pad_token_id, "labels": IGNORED, "weights": 0.0}
        columns = {
            name: pad_right([row[name] for row in rows], fillers[name])
            for name in fillers
            if name in rows[0]
        }
        batch = {name: values for name, (values, _) in columns.items()}
        return _counted({**batch, "attention_mask": columns["input_ids"][1]})

    def _pack(self, rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.tensor([[value for row in rows for value in row[name]]])  # (1, sum of T)
            for name in ("input_ids", "labels", "weights")
            if name in rows[0]
        }
        positions = [p for row in rows for p in range(len(row["input_ids"]))]
        return _counted({**batch, "position_ids": torch.tensor([positions])})


def _counted(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the size of its weights by row, when it has weights."""
    if "weights" not in batch:
        return batch
    return {**batch, "item_counts": batch["weights"].abs().sum(-1)}


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of shape (B, T), padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
