"""Keys and values of rows in a cache of transformers: rows leave it, and others join them.

Rows are padded on the left, so that all of them grow at the right end. Columns count from there:
rows of two caches are put together by padding the shorter ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def can_join(cache: DynamicCache) -> bool:
    """Whether rows can join: each layer holds keys and values, and no state of another kind."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def filled_width(cache: DynamicCache) -> int:
    """Columns that it holds; 0 where no layer holds keys."""
    layers = (layer for layer in cache.layers if isinstance(layer, DynamicLayer))
    first = next(layers, None)
    return 0 if first is None else int(first.get_seq_length())


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Only these rows, in this order; one may be given several times."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def set_width(cache: DynamicCache, width: int) -> None:
    """Cut columns off at the left, or add some of padding there, up to `width`."""
    for layer in cache.layers:
        own: Any = layer
        columns = width
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = width
            columns = min(width, layer.sliding_window - 1)
        missing = columns - own.keys.shape[-2]
        own.keys, own.values = _set_columns(own.keys, missing), _set_columns(own.values, missing)


def _set_columns(values: Tensor, missing: int) -> Tensor:
    # Padding of a negative size cuts off.
    return nn.functional.pad(values, (0, 0, missing, 0)) if missing else values


def join(cache: DynamicCache, other: DynamicCache) -> None:
    """Put the rows of another cache of the same width behind the rows of this one."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        own: Any = layer
        new: Any = added
        own.keys = torch.cat([own.keys, new.keys])
        own.values = torch.cat([own.values, new.values])
