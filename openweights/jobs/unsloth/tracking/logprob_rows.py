"""Conversations whose log-probabilities are followed: what is scored of them, and what is written.

Two formats. Where all messages are plain texts a result is the conversation with `tokens`,
`token_ids`, `logprobs` (null for the first, which nothing predicts) and `is_answer`, a value for
each token. Where messages have blocks, each block gets its `tokens` and `logprobs`. Weights of
blocks do not count here.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights import events
from openweights.jobs.unsloth.config.encoding import (
    Encoded,
    Reader,
    encode_row,
    encode_text,
    pieces_of_tokens,
)
from openweights.jobs.unsloth.config.file_rows import MadeSequence
from openweights.jobs.unsloth.config.rendering import LearnedText, TrainOn, block_spans
from openweights.jobs.unsloth.config.rows import Row, plain_messages
from openweights.jobs.unsloth.data import end_texts, usable_rows
from openweights.models.log_probs import all_log_probs
from openweights.models.templates.messages import assistant_messages
from openweights.models.templates.rendering import rendered_spans
from openweights.models.tokens import IGNORED

logger = logging.getLogger(__name__)


TokenText = Callable[[int], str]
Blocks = dict[tuple[int, int], list[int]]  # message and block -> positions of the block's tokens


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A conversation, ready to be scored; of each there are few bytes, as there may be many.

    Attributes:
        rows, place: Where the conversation is.
        input_ids: Its tokens.
        is_answer: Of each token, 1 where the assistant speaks.
        blocks: Where messages have some.
    """

    rows: Sequence[Row]
    place: int
    input_ids: array[int]
    is_answer: bytes
    blocks: Blocks

    @property
    def row(self) -> Row:
        """The conversation."""
        return self.rows[self.place]


class Results(MadeSequence[dict[str, Any]]):
    """The results, a row for each conversation.

    Args:
        values: Of each row, the log-probabilities of its tokens but the first.
        blockwise: Whether blocks have them.
    """

    def __init__(
        self,
        rows: Sequence[ScoredRow],
        values: Sequence[array[float]],
        tokenizer: PreTrainedTokenizerBase,
        blockwise: bool,
    ) -> None:
        self._rows = rows
        self._values = values
        self._text = cache(lambda token: str(tokenizer.decode([token])))
        self._result = _blockwise_result if blockwise else _result

    def __len__(self) -> int:
        return len(self._rows)

    def made(self, at: int) -> dict[str, Any]:
        """The result of a conversation."""
        return self._result(self._rows[at], self._values[at].tolist(), self._text)


@dataclass(frozen=True, slots=True)
class LogProbs:
    """What a model says of a set of conversations.

    Attributes:
        loss: Mean of -log p over the answers' tokens; None where no token of any is left.
        rows: The results.
        blocks: Of each tagged block `row`, `message`, `block`, `tag`, `text` and `logprobs`.
        blockwise: Whether some message has blocks.
    """

    loss: float | None
    rows: Results
    blocks: list[dict[str, Any]]
    blockwise: bool

    def summary(self, key: str, **fields: Any) -> dict[str, Any]:
        """The event of the set, with the loss as `key` where there is one."""
        kind = events.BlockwiseLogProbs if self.blockwise else events.LogProbs
        return kind(values={} if self.loss is None else {key: self.loss}, **fields).data()

    def block_events(self, source: str, step: int | None = None) -> Iterator[dict[str, Any]]:
        """An event for each tagged block."""
        for block in self.blocks:
            yield events.BlockLogProbs(step=step, source=source, **block).data()


def scored_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int],
    train_on: TrainOn = "responses",
    limit: int | None = None,
    name: str = "dataset",
) -> list[ScoredRow]:
    """Render and tokenise conversations.

    Args:
        ends: Ids of the end tokens (`tokens.eos_token_ids`).
        train_on: What counts as the answer, as of `TrainingConfig`.
        limit: Longest row in tokens; what is longer loses its end, which is told in the log.
        name: What the rows are called in messages.

    Raises:
        DatasetError: A row cannot be used.
    """
    texts = end_texts(tokenizer, ends)

    def encode(row: Row) -> tuple[tuple[Encoded, Blocks], frozenset[str]]:
        encoded, blocks = _encoded(row, tokenizer, texts, train_on)
        return (encoded, blocks), encoded.notes

    reader = Reader[tuple[Encoded, Blocks]](
        encode,
        length=lambda scored: len(scored[0].input_ids),
        limit=limit,
        cut=lambda scored, limit: scored[0].cut(limit),
    )
    kept = [
        ScoredRow(
            rows,
            at,
            array("i", encoded.input_ids),
            bytes(label != IGNORED for label in encoded.labels),
            blocks,
        )
        for at, (encoded, blocks) in usable_rows(rows, reader, name=name)
    ]
    if not any(any(row.is_answer) for row in kept):
        logger.warning("%s: no token of an answer is left, so there is no loss to tell", name)
    return kept


def _encoded(
    row: Row, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], train_on: TrainOn
) -> tuple[Encoded, Blocks]:
    if "messages" not in row:
        return encode_row(row, tokenizer, train_on=train_on, ends=ends), {}
    messages, contents = plain_messages(row), [m.get("content") for m in row["messages"]]
    said = assistant_messages(messages)
    wanted = said[-1:] if train_on == "last" else said
    with_blocks = [index for index, content in enumerate(contents) if isinstance(content, list)]
    rendered = rendered_spans(
        tokenizer, messages, {*wanted, *with_blocks}, ends, tools=row.get("tools")
    )
    answers = [(span.start, span.end, 1.0) for span in rendered.spans if span.message in wanted]
    everything = [(0, len(rendered.text), 1.0)]
    pieces = everything if train_on == "all" else answers
    encoded = encode_text(LearnedText(rendered, pieces), tokenizer)
    blocks = {
        (span.message, number): place
        for span in rendered.spans
        if span.message in with_blocks
        for number, place in enumerate(block_spans(span, contents[span.message]))
    }
    positions: Blocks = {key: [] for key in blocks}
    keys = list(blocks)
    for token, at in enumerate(pieces_of_tokens(encoded.offsets, list(blocks.values()))):
        if at is not None and token > 0:
            positions[keys[at]].append(token)
    return encoded, positions


def score_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ScoredRow],
    *,
    batch_size: int,
) -> LogProbs:
    """Log-probabilities of the rows' tokens under the model's current weights."""
    total, count = 0.0, 0
    kept: list[array[float]] = []
    blocks: list[dict[str, Any]] = []
    blockwise = any(row.blocks for row in rows)
    ids = [row.input_ids for row in rows]
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    scores = all_log_probs(model, ids, pad, batch_size=batch_size)
    for number, (row, values) in enumerate(zip(rows, scores, strict=True)):
        answer = row.is_answer[1:]
        total -= sum(value for value, wanted in zip(values, answer, strict=True) if wanted)
        count += sum(row.is_answer)
        kept.append(array("d", values))
        blocks += [{"row": number, **block} for block in _tagged_blocks(row, values)]
    results = Results(rows, kept, tokenizer, blockwise)
    return LogProbs(total / count if count else None, results, blocks, blockwise)


def _result(row: ScoredRow, values: list[float], text: TokenText) -> dict[str, Any]:
    ids = row.input_ids.tolist()
    return {
        **row.row,
        "token_ids": ids,
        "tokens": [*map(text, ids)],
        "logprobs": [None, *values],
        "is_answer": [*map(bool, row.is_answer)],
    }


def _blockwise_result(row: ScoredRow, values: list[float], text: TokenText) -> dict[str, Any]:
    """The row, its blocks with `tokens` and `logprobs`."""
    told, ids = dict(row.row), row.input_ids
    if not row.blocks:
        return told
    messages = [
        {**m, "content": list(m["content"])} if isinstance(m.get("content"), list) else m
        for m in told["messages"]
    ]
    for (message, block), positions in row.blocks.items():
        inside = [position for position in positions if position < len(ids)]
        messages[message]["content"][block] = {
            **messages[message]["content"][block],
            "tokens": [text(ids[position]) for position in inside],
            "logprobs": [values[position - 1] for position in inside],
        }
    return {**told, "messages": messages}


def _tagged_blocks(row: ScoredRow, values: list[float]) -> Iterator[dict[str, Any]]:
    messages = row.row["messages"] if row.blocks else []
    for (message, block), positions in row.blocks.items():
        content = messages[message]["content"][block]
        if content.get("tag") is not None:
            yield {
                "message": message,
                "block": block,
                "tag": content["tag"],
                "text": content["text"],
                "logprobs": [values[p - 1] for p in positions if p <= len(values)],
            }
