"""Rows of a `conversations` file -> token ids and labels.

Labels are made here and nowhere else: -100 for what is read, the token itself for what is learned.
With `train_on_responses_only` that is each assistant message with the end token that closes its
turn. The first token of a sequence is never a label: nothing predicts it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from openweights.errors import ConfigError, DatasetError
from openweights.jobs.unsloth.model import eos_token_ids
from openweights.jobs.unsloth.rows import Row, plain_messages
from openweights.jobs.unsloth.spans import Message, Span, assistant_spans
from openweights.jobs.unsloth.validate import TrainingConfig

IGNORED = -100

logger = logging.getLogger(__name__)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as one text.

    Raises:
        ConfigError: The tokenizer has no chat template.
        ValueError: The template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "chat_template: the model's tokenizer has none; give one, or choose an instruct model"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it ({error}); correct the messages") from None
    assert isinstance(text, str)
    return text


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """What the model continues to answer the conversation."""
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(slots=True)
class Encoded:
    """One row for the trainer."""

    input_ids: list[int]
    labels: list[int]


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, responses_only: bool, ends: Sequence[str]
) -> Encoded:
    """Tokens and labels of a row, of whatever length.

    A `text` row is learned as a whole and closed with the end token. A conversation that the
    template leaves open after an assistant message is closed with it, too.

    Raises:
        ValueError: The row cannot be rendered.
    """
    if "messages" not in row:
        return _encode_text(row, tokenizer)
    messages = plain_messages(row)
    if responses_only:
        text, spans = assistant_spans(messages, lambda m: render_chat(tokenizer, m), ends)
        if not spans:
            raise ValueError(
                "field 'messages': no assistant message to learn from; add one, or set "
                "train_on_responses_only=False"
            )
    else:
        text = render_chat(tokenizer, messages)
        spans = [(0, len(text))]
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(tuple(ends)):
        if responses_only and spans[-1][1] < len(text):
            text = text[: spans[-1][1]]
        spans[-1] = (spans[-1][0], len(text) + len(str(tokenizer.eos_token)))
        text += str(tokenizer.eos_token)
    return _encode_spans(text, spans, tokenizer)


def _encode_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError("has neither 'messages' nor 'text'; give one of them")
    ids = list(tokenizer(text)["input_ids"])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return Encoded(ids, [IGNORED, *ids[1:]])


def _encode_spans(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Labels for every token that touches a span."""
    # The template wrote the special tokens that the model wants; adding more would double them.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = list(encoding["input_ids"]), []
    remaining = list(spans)
    for token, (start, stop) in zip(ids, encoding["offset_mapping"], strict=True):
        while remaining and remaining[0][1] <= start:
            remaining.pop(0)
        learned = bool(remaining) and stop > remaining[0][0] and stop > start
        labels.append(token if learned else IGNORED)
    labels[0] = IGNORED
    return Encoded(ids, labels)


def sft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
) -> list[dict[str, list[int]]]:
    """Rows for the trainer: `input_ids` and `labels`, at most `max_seq_length` tokens each.

    A longer row loses its end; when nothing to learn is left of it, it is dropped. Both are counted
    in the log.

    Args:
        ends: Ids of the end tokens (`model.eos_token_ids`); None for the tokenizer's only.
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    end_ids = eos_token_ids(None, tokenizer) if ends is None else ends
    texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids]
    limit, cut, kept = config.max_seq_length, 0, []
    for number, row in enumerate(rows, start=1):
        try:
            encoded = encode_row(
                row, tokenizer, responses_only=config.train_on_responses_only, ends=texts
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise DatasetError(f"{name}: row {number}: {error}") from None
        cut += len(encoded.input_ids) > limit
        if any(label != IGNORED for label in encoded.labels[:limit]):
            kept.append({"input_ids": encoded.input_ids[:limit], "labels": encoded.labels[:limit]})
    _report(name, rows, kept, cut, limit)
    return kept


def _report(
    name: str, rows: Sequence[Row], kept: Sequence[dict[str, list[int]]], cut: int, limit: int
) -> None:
    dropped = len(rows) - len(kept)
    if not kept:
        raise DatasetError(
            f"{name}: nothing to learn is left of any row within max_seq_length={limit}; raise it"
        )
    tokens = sum(len(row["input_ids"]) for row in kept)
    learned = sum(label != IGNORED for row in kept for label in row["labels"])
    logger.info("%s: %d rows, %d tokens, %d learned", name, len(kept), tokens, learned)
    if cut:
        logger.warning(
            "%s: %d rows are longer than max_seq_length=%d: %d lost their end, %d were dropped "
            "because nothing to learn was left",
            name,
            cut,
            limit,
            cut - dropped,
            dropped,
        )
    if text_rows := sum("messages" not in row for row in rows):
        logger.info("%s: %d rows are plain text and are learned as a whole", name, text_rows)


def pad_right(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
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

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        return self._pack(rows) if self.packed else self._pad(rows)

    def _pad(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_token_id)
        labels, _ = pad_right([row["labels"] for row in rows], IGNORED)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def _pack(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        def joined(key: str) -> torch.Tensor:
            return torch.tensor([[token for row in rows for token in row[key]]])

        positions = [p for row in rows for p in range(len(row["input_ids"]))]
        return {
            "input_ids": joined("input_ids"),  # (1, sum of T)
            "labels": joined("labels"),
            "position_ids": torch.tensor([positions]),
        }
