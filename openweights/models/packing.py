"""Rows of different length laid end to end, without padding: attention that keeps them apart, and
how rows are divided over micro-batches.

`use_packed_attention` registers an attention with transformers that reads the borders of rows
(`cu_seq_lens_q`, the name that transformers gives them). On CUDA in half precision that is the
variable-length flash attention of torch, whose cost is the sum of the squares of the lengths;
elsewhere it goes row by row through `scaled_dot_product_attention`, which is exact. Scores that are
soft-capped (Gemma 2), which both leave out, are computed as they are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from heapq import nlargest
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from openweights.models.forward import HALF, base_model, decoder_of, evaluating
from openweights.models.tokens import Collator, borders, item_counts

logger = logging.getLogger(__name__)

NAME = "openweights_packed"
_PROBE_TOKENS = 64
# Logits of one row may differ by this share of their size between packed and alone: rounding, not
# leakage.
LEAK_TOLERANCE = 1e-3
ROUNDINGS = 3  # so many times what another shape of the batch does may packing do to a row
# What a decoder is told of rows, beside their ids.
_ROW_INPUTS = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
               "max_length_k")  # fmt: skip
_COLUMNS = ("input_ids", "labels", "weights", "position_ids")  # of shape (1, T)
_BORDERS: ContextVar[bool] = ContextVar("borders", default=False)
# Architectures whose windows are in their masks alone.
WINDOW_IN_MASK = ("doge", "llama4_text", "phimoe", "qwen2_moe")
# Tensors that attention may be given beside those that it reads, without a change of its result.
_UNREAD = ("position_ids", "cu_seq_lens_k", "cache_position")
_FLASH_HEAD_DIM = 256  # the widest head of torch's flash attention


class HiddenInputError(Exception):
    """Attention was given more than is read here."""


def use_packed_attention(model: Any) -> bool:
    """Let `model` read the borders of packed rows; other inputs go on as before.

    Returns:
        False, with nothing changed, for models whose attention is not `sdpa`, or hides more than
        what `packed_attention` is told: what else theirs does (sinks, choices) is not known here.
    """
    config = getattr(model, "config", None)
    present = getattr(config, "_attn_implementation", None)
    if config is None or present != "sdpa":
        return present == NAME
    if hides_more(config.get_text_config()):
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def hides_more(config: Any) -> bool:
    """Whether the layers of a model see less than the windows that attention is told of."""
    if chooses_tokens(config):
        return True
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", 0)
    return config.model_type in WINDOW_IN_MASK and bool(window)


def chooses_tokens(config: Any) -> bool:
    """Whether layers see tokens that they choose, or sum up, among all those before."""
    return any(getattr(config, name, None) for name in ("index_topk", "compress_rates"))


def cap_attention(model: Any) -> None:
    """Let a model whose scores are soft-capped compute them so, as torch's attention does not."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        use_packed_attention(model)


@contextmanager
def borders_given(given: Mapping[str, Any]) -> Iterator[None]:
    """Around a forward pass: where the inputs hold the borders of rows, no mask is made."""
    token = _BORDERS.set("cu_seq_lens_q" in given)
    try:
        yield
    finally:
        _BORDERS.reset(token)


def last_hidden(base: Any, batch: Mapping[str, Any], prefix: str = "") -> Tensor:
    """Last hidden states of the rows of a batch, padded or packed; shape (B, T, H).

    Args:
        base: The causal language model itself (`forward.base_model`).
        batch: `input_ids` of shape (B, T), with `attention_mask`, or `position_ids` and borders.
        prefix: That the names of the batch begin with.
    """
    given = {name: batch[prefix + name] for name in _ROW_INPUTS if prefix + name in batch}
    ids = batch[f"{prefix}input_ids"]
    with borders_given(given):
        hidden = decoder_of(base)(input_ids=ids, use_cache=False, **given).last_hidden_state
    # Mamba keeps its residuals in float32, and narrows them for its head.
    narrow = base.get_output_embeddings().weight.dtype
    return hidden.to(narrow) if narrow in HALF else hidden


def row_numbers(positions: Tensor, starts: Tensor | None) -> tuple[Tensor, int]:
    """The rows that true positions of a mask (B, T) belong to, and how many rows there are.

    Args:
        starts: `cu_seq_lens_q` of packed rows, whose mask is of shape (1, T).
    """
    rows, columns = positions.nonzero(as_tuple=True)
    if starts is None:
        return rows, len(positions)
    return torch.bucketize(columns, starts[1:], right=True), len(starts) - 1


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _BORDERS.get() else sdpa_mask(*args, **kwargs)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows.

    Args:
        query: Shape (B, heads, T, d); `key` and `value` may have fewer heads.
        cu_seq_lens_q: Where rows begin and the last ends, int32, shape (rows + 1,); then B is 1.
        max_length_q: The longest row.

    Returns:
        Shape (B, T, heads, d).

    Raises:
        HiddenInputError: The model gives packed rows biases, choices or masks of its own.
    """
    if cu_seq_lens_q is not None:
        own = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if attention_mask is not None or not set(own) <= set(_UNREAD):
            raise HiddenInputError
    if cu_seq_lens_q is None and softcap is not None:
        output = _capped(query, key, value, attention_mask, dropout, scaling, softcap)
        return output.transpose(1, 2).contiguous(), None
    if cu_seq_lens_q is None:
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        if query.device.type == "cpu":
            return _on_a_cpu(module, query, key, value, attention_mask, given)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # as attention of torch's own does
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    longest = query.shape[2] if max_length_q is None else max_length_q
    widths = {query.shape[-1], value.shape[-1]}
    is_plain = softcap is None and len(widths) == 1 and max(widths) <= _FLASH_HEAD_DIM
    if query.is_cuda and query.dtype in HALF and is_plain:
        window = sliding_window if sliding_window is not None and longest > sliding_window else None
        borders = (cu_seq_lens_q, longest)
        return _flash(query, key, value, borders, dropout, scaling, window)[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    row = _row if softcap is None else partial(_capped_row, softcap=softcap)
    with _wide_on_a_cpu(query) as (wide, dtype):
        parts = (wide(x).split(sizes, dim=2) for x in (query, key, value))
        rows = zip(*parts, strict=True)
        outputs = [row(q, k, v, dropout, scaling, sliding_window) for q, k, v in rows]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous().to(dtype), None


@contextmanager
def _wide_on_a_cpu(query: Tensor) -> Iterator[tuple[Callable[[Tensor], Tensor], torch.dtype]]:
    """How attention's inputs are widened, and the type of its output.

    On a CPU torch's attention takes two to ten times as long in half precision as in float32.
    """
    if query.device.type != "cpu" or query.dtype not in HALF:
        yield lambda x: x, query.dtype
        return
    with torch.autocast("cpu", enabled=False):
        yield Tensor.float, query.dtype


def _on_a_cpu(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    given: Mapping[str, Any],
) -> tuple[Tensor, None]:
    """Rows under a mask, as torch's attention would; keys and values are not repeated for it."""
    with _wide_on_a_cpu(query) as (wide, dtype):
        query, key, value = wide(query), wide(key), wide(value)
        if mask is None or given.get("position_bias") is not None:
            output, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
            return output.to(dtype), None
        mask = mask.to(query.dtype) if mask.is_floating_point() else mask
        output = scaled_dot_product_attention(
            query, key, value, mask, given["dropout"], scale=given["scaling"],
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output.transpose(1, 2).contiguous().to(dtype), None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[Tensor, int],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Shape (T, heads, d). A window of w keeps each token and the w - 1 before it."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    starts, longest = borders
    return torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, dropout, True, False,
        scale=scaling, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Shape (B, heads, T, d)."""
    length, mask = query.shape[2], None
    if window is not None and length > window:
        mask = _seen(length, window, query.device)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _capped_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    *,
    softcap: float,
) -> Tensor:
    """`_row` with soft-capped scores."""
    length = query.shape[2]
    mask = _seen(length, window or length, query.device)
    return _capped(query, key, value, mask, dropout, scaling, softcap)


def _seen(length: int, window: int, device: torch.device) -> Tensor:
    """Which tokens each sees: itself, and the window - 1 before it; shape (T, T)."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """softmax(cap(q k^T * scaling)) v with cap(z) = softcap * tanh(z / softcap), causal without a
    mask; shape (B, heads, T, d). Tokens that see nothing have the mean of all.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        mask = _seen(query.shape[2], query.shape[2], query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.dropout(weights, dropout).to(value.dtype) @ value


def may_pack(model: nn.Module, examples: Sequence[Mapping[str, list[int]]]) -> bool:
    """`keeps_rows_apart`, and a line in the log that says what follows from it."""
    packed = keeps_rows_apart(model, examples)
    logger.info(
        "packing: rows of a batch are laid end to end"
        if packed
        else "packing is off: this model does not keep packed rows apart, so rows are padded"
    )
    return packed


def keeps_rows_apart(model: nn.Module, examples: Sequence[Mapping[str, list[int]]]) -> bool:
    """Whether the model keeps packed rows apart, as it does after this where it can.

    Changes the first of two packed rows and looks at the logits of the second, which must not move,
    and must be those of the row alone, but for rounding: what another shape of the batch does to
    them is measured. In bfloat16 that is 9 % of the largest after 64 layers of random weights. An
    architecture with attention of its own is found out. One that chooses tokens is not packed: it
    does so in rows that are longer than those that are looked at.
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    if config is not None and chooses_tokens(config.get_text_config()):
        return False
    longest = nlargest(2, (example["input_ids"] for example in examples), key=len)
    first, second = (list(row[:_PROBE_TOKENS]) for row in (longest[-1], longest[0]))
    changed = [first[0]] * len(first) if len(set(first)) > 1 else [second[-1]] * len(first)
    alone = _last_row_logits(model, [second])
    rounding = float((_logits(model, _beside_itself(second))[1] - alone).abs().max())
    before = getattr(config, "_attn_implementation", None)
    own = use_packed_attention(base)
    try:
        packed, other = (_last_row_logits(model, [row, second]) for row in (first, changed))
    except HiddenInputError:
        base.set_attn_implementation(before)
        return False
    scale = float(alone.abs().max()) or 1.0
    # Rounding in half precision depends on the shape of the whole batch.
    loose = 5e-2 if _is_half(model) else LEAK_TOLERANCE
    leaked = float((packed - other).abs().max()) > LEAK_TOLERANCE * scale
    differs = float((packed - alone).abs().max()) > max(loose * scale, ROUNDINGS * rounding)
    if own and (leaked or differs):
        base.set_attn_implementation(before)
    return not leaked and not differs


def _last_row_logits(model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
    batch = Collator(0, packed=True)([{"input_ids": row, "labels": row} for row in rows])
    unknown = ("labels", "item_counts")  # to a model
    if len(rows) == 1:
        unknown += ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    given = {name: value for name, value in batch.items() if name not in unknown}
    return _logits(model, given)[0, -len(rows[-1]) :]


def _beside_itself(row: Sequence[int]) -> dict[str, Tensor]:
    """A batch that has the row twice, the one below the other: as many tokens as two packed rows,
    none of which could leak.
    """
    ids = torch.tensor([row, row])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Shape (B, T, words), in float32."""
    device = next(model.parameters()).device
    given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    # As it is trained: other kernels round differently, some of them each time.
    with evaluating(model), borders_given(given), _as_trained(device):
        return model(**given, use_cache=False).logits.float()


def _as_trained(device: torch.device) -> torch.autocast:
    half = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        half = torch.float16
    return torch.autocast(device.type, half, enabled=device.type == "cuda")


def _is_half(model: nn.Module) -> bool:
    """Whether it computes in half precision, as every model does on CUDA."""
    return any(p.is_cuda or p.dtype in HALF for p in model.parameters())


def divided(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in groups of at most `budget` tokens, as few as first-fit decreasing makes.

    A row that is longer than the budget has a group of its own.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((at for at, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            groups.append([])
            room.append(budget)
            place = len(groups) - 1
        groups[place].append(index)
        room[place] -= lengths[index]
    return [sorted(group) for group in groups]


def repacked(batches: Sequence[Mapping[str, Tensor]], budget: int) -> list[dict[str, Any]]:
    """The rows of packed batches in as few packed batches as the budget allows.

    Args:
        batches: As a packing `Collator` makes them.
        budget: Tokens of a batch, see `divided`.

    Returns:
        Batches with the same columns, and the borders of rows as `packed_attention` reads them;
        `batches` themselves if they are fewer.
    """
    names = [name for name in _COLUMNS if name in batches[0]]
    columns = {name: torch.cat([batch[name][0] for batch in batches]) for name in names}
    lengths = torch.cat([batch["cu_seq_lens_q"].diff() for batch in batches]).tolist()
    starts = [0, *accumulate(lengths)]
    groups = divided(lengths, budget)
    if len(groups) > len(batches):
        return [dict(batch) for batch in batches]
    packs: list[dict[str, Any]] = []
    device = columns["input_ids"].device
    for group in groups:
        rows = [slice(starts[index], starts[index + 1]) for index in group]
        pack: dict[str, Any] = {
            name: torch.cat([values[row] for row in rows])[None] for name, values in columns.items()
        }
        for name, value in borders([lengths[index] for index in group]).items():
            pack[name] = value.to(device) if isinstance(value, Tensor) else value
        packs.append({**pack, "item_counts": item_counts(pack)})
    return packs
