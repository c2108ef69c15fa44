"""Decode steps of a batch: forward, draw, note, and on to the next token without the host.

On CUDA a step is captured once for each shape and replayed; elsewhere it runs as it is written. A
block of steps begins with one upload of what the rows are, and ends with one download of what they
drew, so no state of a row lives on the device between blocks, and any rows may make up the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from openweights.generation.cuda.batch import TokenBatch, slots_of
from openweights.generation.cuda.decoder import Decoder, PagedCache
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.selection import Rows, log_probs, select, top_log_probs

BLOCK_STEPS = 16  # the most steps of a block
WARM_UP_STEPS = 2
ROW_COUNTS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class RowState:
    """Where a row is.

    Attributes:
        request: Whose.
        key: `row_key` of the sample.
        ends: What ends it.
        token: Its last token.
        position: Of that token.
        generated: Tokens of the completion so far.
        row: Of the page tables.
        adapter: Index; -1 for none.
        limit: The last position that it has a page for.
        completion: The tokens so far, where penalties count them.
    """

    request: GenerationRequest
    key: tuple[int, int]
    ends: frozenset[int]
    token: int
    position: int
    generated: int
    row: int
    adapter: int
    limit: int
    completion: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the rows of a batch drew in some steps; shapes (steps, B) and (steps, B, K)."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    top_values: list[list[list[float]]]
    top_ids: list[list[list[int]]]

    def of(
        self, row: int, params: SamplingParams
    ) -> tuple[list[int], list[float], list[dict[int, float]]]:
        """Tokens of one row, and of its log-probabilities what its parameters ask for."""
        tokens = [step[row] for step in self.tokens]
        own = [step[row] for step in self.log_probs] if params.logprobs else []
        count = params.top_logprobs
        tops = zip(self.top_ids, self.top_values, strict=True) if count else ()
        likeliest = [
            dict(zip(ids[row][:count], values[row][:count], strict=True)) for ids, values in tops
        ]
        return tokens, own, likeliest


@dataclass(frozen=True, slots=True)
class Asked:
    """What has to be computed beside the tokens, for all rows of a batch."""

    log_probs: bool
    top_count: int

    @classmethod
    def by(cls, requests: Sequence[GenerationRequest]) -> Asked:
        """What any of the requests asks for."""
        params = [request.params for request in requests]
        return cls(any(p.logprobs for p in params), max(p.top_logprobs for p in params))


def note(logits: Tensor, tokens: Tensor, rows: Rows, asked: Asked) -> tuple[Tensor, ...]:
    """What is told of a draw: log-probabilities, and values and ids of the likeliest tokens."""
    size, device = len(tokens), logits.device
    own = torch.zeros(size, device=device)
    values = torch.zeros(size, 0, device=device)
    ids = torch.zeros(size, 0, dtype=torch.long, device=device)
    if asked.log_probs:
        own = log_probs(logits, tokens, rows).float()
    if asked.top_count:
        values, ids = top_log_probs(logits, asked.top_count, rows)
    return tokens, own, values.float(), ids


def row_count(rows: int) -> int:
    """The smallest batch that holds so many rows, of those that are captured."""
    fitting = [count for count in ROW_COUNTS if count >= rows]
    return fitting[0] if fitting else -(-rows // 64) * 64


def rows_of(states: Sequence[RowState], count: int, vocabulary: int, device: Any) -> Rows:
    """How the states draw, filled up to `count` rows that draw greedily."""
    idle = count - len(states)
    return Rows.of(
        [s.request.params for s in states] + [GREEDY] * idle,
        [s.key for s in states] + [(0, 0)] * idle,
        [s.ends for s in states] + [frozenset[int]()] * idle,
        vocabulary,
        device,
    )


def shape_of(rows: Rows, asked: Asked) -> tuple[Any, ...]:
    """What steps of one kind have in common: such can be run by the same captured step."""
    flags = (rows.draws, rows.widest, rows.limits, rows.penalizes, rows.delays)
    return (len(rows), rows.ends.shape[1], *flags, asked)


class Steps:
    """Steps for batches of one shape.

    Args:
        decoder: Computes them.
        cache: Keys and values.
        tables: Pages of each row, shape (rows + 1, pages), int32; the last row is for idle rows.
        rows: Some batch of the shape.
        asked: What is told beside the tokens.
        narrow: Multiply by the fp8 copies.
        memory: Handle of the graphs' memory pool; None to run uncaptured.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        tables: Tensor,
        rows: Rows,
        asked: Asked,
        *,
        narrow: bool,
        memory: Any,
    ) -> None:
        size, device = len(rows), decoder.device
        self._decoder, self._cache, self._tables = decoder, cache, tables
        self._seen_tables = tables  # as much of them as is looked at
        self._is_captured = memory is not None
        self._asked, self._narrow = asked, narrow
        self._rows = rows
        # Token, position, tokens so far, row of the tables, adapter, last position of each row.
        self._state = torch.zeros(6, size, dtype=torch.long, device=device)
        self._state[3] = len(tables) - 1
        self._state[4] = -1
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._counts = self._new_counts(size, []) if rows.penalizes else None
        block, likeliest = (BLOCK_STEPS, size), min(asked.top_count, decoder.vocabulary)
        self._drawn = (
            torch.zeros(block, dtype=torch.long, device=device),
            torch.zeros(block, device=device),
            torch.zeros(*block, likeliest, device=device),
            torch.zeros(*block, likeliest, dtype=torch.long, device=device),
        )
        each = torch.arange(size, dtype=torch.int32, device=device)
        self._first, self._one = each, torch.ones_like(each)
        self._advance = self._advance_once if memory is None else self._captured(memory)

    def run(self, states: Sequence[RowState], rows: Rows, steps: int) -> Drawn:
        """So many tokens more for each state; what a row draws after its end means nothing.

        Args:
            states: At most as many as the shape has rows.
            rows: Their draws, filled up (`rows_of`).
        """
        self._load(states, rows)
        for _ in range(steps):
            self._advance()
        return Drawn(*(part[:steps, : len(states)].tolist() for part in self._drawn))

    def _load(self, states: Sequence[RowState], rows: Rows) -> None:
        idle = [(0, 0, 0, len(self._tables) - 1, -1, 0)] * (len(rows) - len(states))
        live = [(s.token, s.position, s.generated, s.row, s.adapter, s.limit) for s in states]
        self._state.copy_(torch.tensor(live + idle).T)
        if not self._is_captured:
            longest = max(state.limit for state in states) // self._cache.page_size + 1
            self._seen_tables = self._tables[:, :longest]
        self._step.zero_()
        for field in fields(rows):
            value = getattr(rows, field.name)
            if isinstance(value, Tensor):
                getattr(self._rows, field.name).copy_(value)
        if self._counts is not None:
            self._counts.copy_(self._new_counts(len(rows), states))

    def _new_counts(self, size: int, states: Sequence[RowState]) -> Tensor:
        counts = torch.zeros(size, self._decoder.vocabulary, dtype=torch.int32)
        for row, state in enumerate(states):
            tokens = torch.tensor(state.completion, dtype=torch.long)
            counts[row].index_add_(0, tokens, torch.ones(len(tokens), dtype=torch.int32))
        return counts.to(self._decoder.device)

    def _drawn_from(self, logits: Tensor, generated: Tensor) -> tuple[Tensor, ...]:
        """Tokens, and what is told of them."""
        rows = self._rows
        if not (rows.penalizes or rows.delays or self._asked.top_count):
            tokens, own = self._decoder.ops.draw(logits, rows, generated)
            return tokens, own, *(part[0] for part in self._drawn[2:])
        tokens = select(logits, rows, generated, self._counts)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))
        return note(logits, tokens, rows, self._asked)

    def _captured(self, memory: Any) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):  # compiles the kernels, lets cuBLAS choose
                self._advance_once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self._advance_once()
        return graph.replay

    def _advance_once(self) -> None:
        """One token more for each row."""
        ids, positions, generated, rows, adapters, limits = self._state
        adapters = adapters.int()
        tables = self._seen_tables
        slots = slots_of(tables, rows, positions, self._cache.page_size)
        tiles = torch.stack((self._first, self._one, rows.int()), dim=1)
        batch = TokenBatch(ids, positions, rows, adapters, tables, slots, tiles, 1)
        hidden = self._decoder.hidden(batch, self._cache, narrow=self._narrow)
        logits = self._decoder.logits(hidden, adapters)
        told = self._drawn_from(logits, generated)
        tokens = told[0]
        for kept, new in zip(self._drawn, told, strict=True):
            kept.index_copy_(0, self._step, new[None])
        self._step += 1
        ids.copy_(tokens)
        generated += 1
        # Past its last page a row writes over its own end; it is finished, and nobody reads that.
        positions.copy_(torch.minimum(positions + 1, limits))
