"""The tokens of one pass through the decoder, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one sequence's prompt, to be computed in one pass.

    Attributes:
        row: The sequence's row of the page tables.
        start: Position of its first token.
        ids: Its tokens.
        adapter: Index of the sequence's adapter; -1 for none.
    """

    row: int
    start: int
    ids: Sequence[int]
    adapter: int


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """T tokens of any sequences, those of one sequence together and in order.

    Attributes:
        ids, positions: Shape (T,).
        rows: Each token's row of `tables`, shape (T,).
        adapters: Index of each token's adapter, -1 for none; shape (T,), int32.
        tables: Pages of each sequence, shape (rows, pages of the longest), int32.
        slots: Where each token's key and value go: page * page size + offset; shape (T,).
        tiles: (first token, tokens, row of tables) of runs of one sequence's tokens, whose queries
            share what they read; shape (tiles, 3), int32. Runs of no tokens are allowed.
        tile_tokens: The most tokens of a run.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    adapters: Tensor
    tables: Tensor
    slots: Tensor
    tiles: Tensor
    tile_tokens: int


def slots_of(tables: Tensor, rows: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Where the keys and values of these positions lie, shape (T,)."""
    pages = tables[rows, positions // page_size].long()
    return pages * page_size + positions % page_size


def prefill_batch(
    pieces: Sequence[Piece], tables: Tensor, page_size: int, tile_tokens: int
) -> TokenBatch:
    """The pieces' tokens one after the other, on the device of `tables`."""
    ids, positions, rows, adapters, tiles = [], [], [], [], []
    for piece in pieces:
        first, count = len(ids), len(piece.ids)
        ids += piece.ids
        positions += range(piece.start, piece.start + count)
        rows += [piece.row] * count
        adapters += [piece.adapter] * count
        for at in range(0, count, tile_tokens):
            tiles.append((first + at, min(tile_tokens, count - at), piece.row))
    device = tables.device
    of_tokens = torch.tensor([ids, positions, rows, adapters]).to(device, non_blocking=True)
    return TokenBatch(
        ids=of_tokens[0],
        positions=of_tokens[1],
        rows=of_tokens[2],
        adapters=of_tokens[3].int(),
        tables=tables,
        slots=slots_of(tables, of_tokens[2], of_tokens[1], page_size),
        tiles=torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
        tile_tokens=tile_tokens,
    )
