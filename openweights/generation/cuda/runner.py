"""The device's side of the `cuda_graph` engine: cache, page tables, prompts and decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openweights.generation.cuda.batch import Piece, prefill_batch
from openweights.generation.cuda.decoder import Decoder, PagedCache
from openweights.generation.cuda.scheduler import Member, Slice
from openweights.generation.cuda.steps import (
    Asked,
    Drawn,
    RowState,
    Steps,
    note,
    row_count,
    rows_of,
    shape_of,
)
from openweights.generation.selection import select

CACHE_SHARE = 0.7  # of the memory that is free, at most


class Runner:
    """Computes what the scheduler decides.

    Args:
        decoder: Of the model.
        rows: How many sequences there may be at a time.
        page_size: Positions of a page.
        narrow: Decode with the fp8 copies of the weights.
        max_length: Of a sequence.
    """

    def __init__(
        self, decoder: Decoder, rows: int, page_size: int, max_length: int, *, narrow: bool
    ) -> None:
        self._narrow, self._page_size, self._max_length = narrow, page_size, max_length
        width = -(-max_length // page_size)
        self._tables = torch.zeros(rows + 1, width, dtype=torch.int32, device=decoder.device)
        self._cache: PagedCache | None = None
        self._steps: dict[tuple[Any, ...], Steps] = {}
        self.replace_decoder(decoder)

    def replace_decoder(self, decoder: Decoder) -> None:
        """Another decoder of the same model, with other adapters; the cache stays."""
        self._decoder = decoder
        self._drop_steps()
        decoder.prepare(self._max_length)

    def _drop_steps(self) -> None:
        """Captured steps hold addresses of what is replaced; with the last of them the memory that
        they share is gone, too.
        """
        self._steps.clear()
        captured = self._decoder.can_be_captured
        self._memory = torch.cuda.graph_pool_handle() if captured else None

    def page_limit(self, *, keeping: bool = False) -> int:
        """How many pages a cache may have in the place of the one there is.

        Args:
            keeping: While that one is there, too.
        """
        if self._decoder.device.type != "cuda":
            return 2**31 - 1
        page = 2 * self._decoder.layer_count * self._decoder.kv_heads * self._page_size
        page *= self._decoder.head_dim * self._decoder.dtype.itemsize
        free = torch.cuda.mem_get_info(self._decoder.device)[0]
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if self._cache is not None and not keeping:
            free += self._cache.keys.nbytes + self._cache.values.nbytes
        return int(free * CACHE_SHARE) // page

    def resize(self, pages: int) -> None:
        """A cache of so many pages in the place of the one there is, whose content is lost."""
        self._drop_steps()
        self._cache = None
        self._use(self._new_cache(pages), pages)

    def grow(self, pages: int) -> bool:
        """A larger cache with the content of the one there is; False where memory does not hold
        both.
        """
        try:
            cache = self._new_cache(pages)
        except torch.OutOfMemoryError:
            return False
        cache.take(self._ready_cache())
        self._drop_steps()
        self._use(cache, pages)
        return True

    def _new_cache(self, pages: int) -> PagedCache:
        # One page more, for the rows that fill a batch up.
        return PagedCache(self._decoder, pages + 1, self._page_size)

    def _use(self, cache: PagedCache, pages: int) -> None:
        self._cache = cache
        self._tables[-1] = pages

    def seat(self, members: Sequence[Member]) -> None:
        """Write the members' pages into the tables."""
        if members:
            longest = max(len(m.lease.pages) for m in members)
            pages = [[*m.lease.pages, *[0] * (longest - len(m.lease.pages))] for m in members]
            rows = torch.tensor([m.row for m in members], device=self._tables.device)
            values = torch.tensor(pages, dtype=torch.int32, device=self._tables.device)
            self._tables[rows, :longest] = values

    def prefill(
        self, slices: Sequence[Slice], adapters: Sequence[int], states: Sequence[RowState]
    ) -> Drawn | None:
        """Compute slices of prompts; what the members that begin to decode draw first.

        Args:
            slices: In order; those of a prompt that others share come before theirs.
            adapters: Index of each slice's adapter.
            states: Of all `starts` of the slices, in order.
        """
        cache = self._ready_cache()
        pieces = [
            Piece(s.member.row, s.start, s.member.work.prompt[s.start : s.stop], adapter)
            for s, adapter in zip(slices, adapters, strict=True)
        ]
        longest = max(s.stop for s in slices)
        tables = self._tables[:, : -(-longest // self._page_size)]
        batch = prefill_batch(pieces, tables, self._page_size, self._decoder.tile_tokens)
        hidden = self._decoder.hidden(batch, cache)
        copies = [copy for s in slices for copy in s.copies]
        if copies:
            cache.copy([source for source, _ in copies], [target for _, target in copies])
        if not states:
            return None
        last = [len(s.starts) * [index] for s, index in zip(slices, _ends(pieces), strict=True)]
        at = torch.tensor([i for indices in last for i in indices], device=hidden.device)
        return self._first_draws(hidden[at], batch.adapters[at], states)

    def _first_draws(self, hidden: Tensor, adapters: Tensor, states: Sequence[RowState]) -> Drawn:
        logits = self._decoder.logits(hidden, adapters)
        rows = rows_of(states, len(states), self._decoder.vocabulary, hidden.device)
        counts = torch.zeros_like(logits, dtype=torch.int32) if rows.penalizes else None
        positions = torch.tensor([s.generated for s in states], device=hidden.device)
        tokens = select(logits, rows, positions, counts)
        told = note(logits, tokens, rows, Asked.by([s.request for s in states]))
        return Drawn(*(part[None].tolist() for part in told))

    def decode(self, states: Sequence[RowState], steps: int) -> Drawn:
        """So many tokens more for each state."""
        cache = self._ready_cache()
        count = row_count(len(states))
        rows = rows_of(states, count, self._decoder.vocabulary, self._decoder.device)
        asked = Asked.by([state.request for state in states])
        shape = shape_of(rows, asked)
        if shape not in self._steps:
            self._steps[shape] = Steps(
                self._decoder, cache, self._tables, rows, asked,
                narrow=self._narrow, memory=self._memory,
            )  # fmt: skip
        return self._steps[shape].run(states, rows, steps)

    def _ready_cache(self) -> PagedCache:
        assert self._cache is not None, "resize before computing"
        return self._cache


def _ends(pieces: Sequence[Piece]) -> list[int]:
    """Index of each piece's last token among all."""
    ends, total = [], 0
    for piece in pieces:
        total += len(piece.ids)
        ends.append(total - 1)
    return ends
