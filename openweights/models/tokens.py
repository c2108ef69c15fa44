"""Tokens that every job handles alike: what ends a completion, what fills rows up, batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from openweights.errors import ConfigError
from openweights.models.reading import IGNORED, check_weights, without_weights
from openweights.models.templates.ends import end_ids, end_of_turn, exchange_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

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
    """Every id that ends a completion: the tokenizer's, those of the generation config, and what
    ends a turn or a call in the chat template, whatever the other two say.
    """
    generation = getattr(model, "generation_config", None)
    return end_ids(tokenizer, getattr(generation, "eos_token_id", None))


def set_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and configs one pad token, and leave of the generation config tokens alone.

    What else a model's own generation config holds (repetition penalty, minimum length, suppressed
    tokens) would be added to what a job asks for wherever something is sampled.

    Raises:
        ConfigError: The tokenizer has no end token, or the weights lack tokens that each row needs.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("model: its tokenizer has no end token; choose a model that has one")
    tokenizer.padding_side = "right"
    ends, vocabulary = eos_token_ids(model, tokenizer), tokenizer.get_vocab()
    missing = _without_weights(model, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in {*ends, *missing}:
        free = [t for t in PAD_CANDIDATES if vocabulary.get(t) not in {None, *ends, *missing}]
        tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    _tell_ends(model, tokenizer, ends)
    given: Any = model.generation_config
    if given is None:
        return
    if unused := _own_settings(given):
        logger.info("the model's own generation settings are not used: %s", unused)
    tokens = {"bos_token_id": given.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    holders: list[Any] = [m for m in model.modules() if hasattr(m, "generation_config")]
    for holder in holders:
        holder.generation_config = GenerationConfig(**tokens, eos_token_id=ends)


def _without_weights(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Mapping[int, str]:
    """Tokens of the tokenizer that the embedding matrix has no row for. Reading one ends the job.

    Raises:
        ConfigError: The end token is one, or the chat template writes one.
    """
    embeddings: Any = model.get_input_embeddings()
    missing = without_weights(tokenizer, len(embeddings.weight))
    if not missing:
        return {}

    def check(ids: Sequence[int]) -> None:
        try:
            check_weights(tokenizer, ids)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None

    check([int(tokenizer.eos_token_id)])  # type: ignore[arg-type]
    check(tokenizer(exchange_text(tokenizer), add_special_tokens=False)["input_ids"])
    logger.warning("the model's weights lack %d tokens of its tokenizer", len(missing))
    embeddings.register_forward_pre_hook(lambda _, inputs: check(inputs[0].unique().tolist()))
    return missing


def _own_settings(generation: GenerationConfig) -> dict[str, Any]:
    """What a generation config asks for beside its tokens."""
    return {
        name: value
        for name, value in generation.to_diff_dict().items()
        if not name.startswith(("_", "transformers")) and not name.endswith("_token_id")
    }


def _tell_ends(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> None:
    """Say so when the template ends turns with a token that the configs do not know as an end."""
    turn = end_of_turn(tokenizer)
    given: Any = getattr(model.generation_config, "eos_token_id", None)
    configured: list[Any] = [tokenizer.eos_token_id]
    configured += [given] if isinstance(given, int) else given or []
    if turn is not None and tokenizer.convert_tokens_to_ids(turn) not in configured:
        logger.warning(
            "the chat template ends a turn with %r, which neither the tokenizer (%r) nor the "
            "generation config (%s) knows as an end; completions end with any of %s",
            turn,
            tokenizer.eos_token,
            given,
            tokenizer.convert_ids_to_tokens(ends),
        )


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
        """`input_ids` and `labels`, where rows have them `weights`, and `item_counts`: how many
        tokens, by their weight, each row of the batch has to learn.
        """
        rows = [_predicted(row) for row in rows]
        batch = self._pack(rows) if self.packed else self._pad(rows)
        return {**batch, "item_counts": item_counts(batch)}

    def _pad(self, rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, torch.Tensor]:
        fillers = {"input_ids": self.pad_token_id, "labels": IGNORED, "weights": 0.0}
        columns = {
            name: pad_right([row[name] for row in rows], fillers[name])
            for name in fillers
            if name in rows[0]
        }
        batch = {name: values for name, (values, _) in columns.items()}
        return {**batch, "attention_mask": columns["input_ids"][1]}

    def _pack(self, rows: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.tensor([[value for row in rows for value in row[name]]])  # (1, sum of T)
            for name in ("input_ids", "labels", "weights")
            if name in rows[0]
        }
        positions = [p for row in rows for p in range(len(row["input_ids"]))]
        lengths = [len(row["input_ids"]) for row in rows]
        return {**batch, "position_ids": torch.tensor([positions]), **borders(lengths)}


def borders(lengths: Sequence[int]) -> dict[str, Any]:
    """Where rows of these lengths begin and end when they are laid end to end, for a decoder."""
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def item_counts(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens, by the size of their weight, each row of a batch has to learn; (B,)."""
    learned = batch["weights"].abs() if "weights" in batch else batch["labels"] != IGNORED
    return learned.sum(-1).float()


def _predicted(row: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """The row without label and weight of its first token, which nothing predicts."""
    nothing = {"labels": IGNORED, "weights": 0.0}
    return {
        name: [nothing[name], *values[1:]] if name in nothing else values
        for name, values in row.items()
    }


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
