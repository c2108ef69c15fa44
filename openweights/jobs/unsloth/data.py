"""Rows of a `conversations` file -> token ids, labels and weights.

Labels are made here and nowhere else: -100 for what is read, the token itself for what is learned.
With `train_on_responses_only` that is each assistant message with the end token that closes its
turn. The first token of a sequence is never a label: nothing predicts it.

A block of a message may have a weight, which then counts for each of its tokens, whoever says it;
a token across two blocks belongs to the first, and the end token of a turn has the weight of what
stands before it. Everything else that is learned weighs 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.errors import DatasetError
from openweights.jobs.unsloth.config.rows import Row, is_weighted, named_row, plain_messages
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.template import (
    MessageSpan,
    assistant_messages,
    rendered_spans,
)
from openweights.models.tokens import IGNORED, eos_token_ids

Piece = tuple[int, int, float]  # characters from, up to, and their weight
Example = dict[str, list[Any]]  # the columns of one row, a value for each token

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Encoded:
    """One row for the trainer.

    Attributes:
        labels: -100 where nothing is learned, which is so where the weight is 0.
        weights: Of each token.
        offsets: Of each token, its first character and the one behind it; empty for plain text.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    offsets: list[tuple[int, int]]


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, responses_only: bool, ends: Sequence[str]
) -> Encoded:
    """Tokens, labels and weights of a row, of whatever length.

    A `text` row is learned as a whole and closed with the end token.

    Raises:
        ValueError: The row cannot be rendered.
    """
    if "messages" not in row:
        return _encode_text(row, tokenizer)
    messages = plain_messages(row)
    everything = set(range(len(messages)))
    learned = set(assistant_messages(messages)) if responses_only else everything
    weighted = {i for i in everything if is_weighted({"messages": [row["messages"][i]]})}
    if not learned | weighted:
        raise ValueError(
            "field 'messages': no assistant message to learn from; add one, or set "
            "train_on_responses_only=False"
        )
    wanted = learned | weighted if responses_only else weighted
    text, spans = rendered_spans(messages, wanted, tokenizer, ends)
    pieces: list[Piece] = []
    position = 0
    for span in spans:
        outside = [] if responses_only else [(position, span.start, 1.0)]
        content = row["messages"][span.message]["content"]
        pieces += outside + _weighted_pieces(span, content, float(span.message in learned))
        position = span.end
    if not responses_only:
        pieces.append((position, len(text), 1.0))
    return encode_pieces(text, pieces, tokenizer)


def _weighted_pieces(span: MessageSpan, content: Any, default: float) -> list[Piece]:
    """A message block by block, and the end token that closes its turn."""
    blocks = [{"text": content}] if isinstance(content, str) else content
    pieces: list[Piece] = []
    weight = default
    for (start, stop), block in zip(block_spans(span, content), blocks, strict=True):
        if start < stop:
            weight = float(default if block.get("weight") is None else block["weight"])
            pieces.append((start, stop, weight))
    return [*pieces, (span.stop, span.end, weight)]


def block_spans(span: MessageSpan, content: Any) -> list[tuple[int, int]]:
    """Where each block of a message is in the rendered text; a string is one block."""
    texts = [content] if isinstance(content, str) else [block["text"] for block in content]
    stops = list(accumulate(map(len, texts), initial=span.start - span.trimmed))
    inside = [min(max(stop, span.start), span.stop) for stop in stops]
    return list(pairwise(inside))


def _encode_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError("has neither 'messages' nor 'text'; give one of them")
    ids = list(tokenizer(text)["input_ids"])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return Encoded(ids, [IGNORED, *ids[1:]], [0.0, *[1.0] * (len(ids) - 1)], [])


def encode_pieces(
    text: str, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Tokens of a rendered text; each has the weight of the first piece that it touches.

    Args:
        pieces: In order, without overlap; what is in none weighs 0.
    """
    # The template wrote the special tokens that the model wants; adding more would double them.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    weights = [0.0 if at is None else pieces[at][2] for at in pieces_of_tokens(offsets, pieces)]
    weights[0] = 0.0
    labels = [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]
    return Encoded(ids, labels, weights, offsets)


def pieces_of_tokens(
    offsets: Sequence[tuple[int, int]], pieces: Sequence[Sequence[float]]
) -> list[int | None]:
    """For each token the index of the first piece that it touches, or None."""
    found: list[int | None] = []
    remaining = [index for index, piece in enumerate(pieces) if piece[0] < piece[1]]
    for start, stop in offsets:
        while remaining and pieces[remaining[0]][1] <= start:
            remaining.pop(0)
        touches = bool(remaining) and pieces[remaining[0]][0] < stop and start < stop
        found.append(remaining[0] if touches else None)
    return found


def sft_examples(
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    ends: Sequence[int] | None = None,
    name: str = "training_file",
    with_weights: bool = False,
) -> list[Example]:
    """Rows for the trainer: `input_ids` and `labels`, at most `max_seq_length` tokens each.

    A longer row loses its end; when nothing to learn is left of it, it is dropped, except for a row
    whose weights say so. Both are counted in the log.

    Args:
        ends: Ids of the end tokens (`model.eos_token_ids`); None for the tokenizer's only.
        name: What the rows are called in messages.
        with_weights: Give each row `weights`, too.

    Raises:
        DatasetError: A row cannot be used, or none is left.
    """
    end_ids = eos_token_ids(None, tokenizer) if ends is None else ends
    texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids]
    limit, cut, kept = config.max_seq_length, 0, []
    for number, row in enumerate(rows, start=1):
        with named_row(name, number):
            encoded = encode_row(
                row, tokenizer, responses_only=config.train_on_responses_only, ends=texts
            )
        cut += len(encoded.input_ids) > limit
        columns = ["input_ids", "labels", *(["weights"] if with_weights else [])]
        example = {column: getattr(encoded, column)[:limit] for column in columns}
        if is_weighted(row) or any(label != IGNORED for label in example["labels"]):
            kept.append(example)
    _report(name, rows, kept, cut, limit)
    return kept


def _report(name: str, rows: Sequence[Row], kept: Sequence[Example], cut: int, limit: int) -> None:
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
