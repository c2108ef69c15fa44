"""`torch_ops` as Triton kernels; imported on CUDA only.

Abbreviations in the kernels: `x_ptr` is a pointer to x; `…_stride` how many elements lie between
its rows; `q`, `k`, `v` are queries, keys and values; a *group* is the heads of queries that share
one head of keys; `tl.constexpr` values are compiled in, and each combination of them is a kernel of
its own. A program is one instance of a kernel: `program_id` says which part of the work is its own.
"""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from openweights.generation.cuda.batch import TokenBatch
from openweights.generation.cuda.torch_ops import Norm
from openweights.generation.cuda.triton_draw import draw as draw

LOG2_E = 1.4426950408889634
ENOUGH_PROGRAMS, MOST_SPLITS = 512, 16
NEVER = tl.constexpr(-1e30)  # below every score, and differences from it are still numbers


@triton.jit
def _normed(wide, weight, scale, FROM_ONE: tl.constexpr):
    """`wide` times `scale` and the weight, rounded where the architecture rounds: Llama rounds
    before it multiplies by the weight, Gemma multiplies by 1 + weight and then rounds."""
    if FROM_ONE:
        return (wide * scale * (1.0 + weight.to(tl.float32))).to(weight.dtype)
    return (wide * scale).to(weight.dtype) * weight


@triton.jit
def _add_norm_kernel(
    x_ptr, x_stride, residual_ptr, post_ptr, weight_ptr, out_ptr, size, post_eps, eps,
    HAS_X: tl.constexpr, HAS_POST: tl.constexpr, FROM_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row, which it holds whole."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(residual_ptr + row * size + columns, mask=mask, other=0.0)
    if HAS_X:
        added = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
        if HAS_POST:
            wide = added.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + post_eps)
            post = tl.load(post_ptr + columns, mask=mask, other=0.0)
            added = _normed(wide, post, scale, FROM_ONE)
        value = value + added
        tl.store(residual_ptr + row * size + columns, value, mask=mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + columns, _normed(wide, weight, scale, FROM_ONE), mask=mask)


@triton.jit
def _gated_kernel(gate_up_ptr, stride, out_ptr, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A program for a block of columns of a row."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + size + columns, mask=mask, other=0.0)
    x = gate.to(tl.float32)
    if IS_SILU:
        active = x * tl.sigmoid(x)
    else:
        # gelu by tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), and 1 + tanh(y) is
        # twice the sigmoid of 2 y.
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(out_ptr + row * size + columns, active.to(gate.dtype) * up, mask=mask)


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, stride, cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr,
    q_norm_ptr, k_norm_ptr, q_eps, k_eps, heads, kv_heads,
    HAS_NORM: tl.constexpr, FROM_ONE: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A program for each token and head: first those of queries, then those of keys, whose
    programs store the value as well."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, HALF)
    is_key = head >= heads
    at = qkv_ptr + token * stride + head * DIM + half
    first, second = tl.load(at), tl.load(at + HALF)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        eps = tl.where(is_key, k_eps, q_eps)
        scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / DIM + eps)
        norm_ptr = k_norm_ptr if is_key else q_norm_ptr
        a = _normed(a, tl.load(norm_ptr + half), scale, FROM_ONE).to(dtype).to(tl.float32)
        b = _normed(b, tl.load(norm_ptr + half + HALF), scale, FROM_ONE).to(dtype).to(tl.float32)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_ptr + position * HALF + half).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half).to(tl.float32)
    turned_1, turned_2 = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    if is_key:
        slot = tl.load(slots_ptr + token)
        kv_head = head - heads
        # Pages are (kv heads, positions, dimensions); a slot is page * page size + offset.
        to = ((slot // PAGE * kv_heads + kv_head) * PAGE + slot % PAGE) * DIM + half
        tl.store(keys_ptr + to, turned_1)
        tl.store(keys_ptr + to + HALF, turned_2)
        value = at + kv_heads * DIM
        tl.store(values_ptr + to, tl.load(value))
        tl.store(values_ptr + to + HALF, tl.load(value + HALF))
    else:
        tl.store(at, turned_1)
        tl.store(at + HALF, turned_2)


# The softmax runs along with the blocks (Milakov & Gimelshein, "Online normalizer calculation for
# softmax", 2018; Dao et al., "FlashAttention", 2022): `highest` is the largest score so far of
# each row, `total` the sum of exp(score - highest), `acc` the sum of values so weighted. When a
# block raises `highest`, what was summed before shrinks by exp(old - new). Exponents are of
# base 2, which is what the hardware computes: `scale` holds the factor log2(e).
#
# Few sequences do not fill the chip, so what they see is split, and `_join_kernel` adds the
# splits up: they leave `acc`, and in `sums` first `highest`, then `total`.
@triton.jit
def _attend_kernel(  # noqa: PLR0915 - one kernel, which cannot be cut
    qkv_ptr, stride, tiles_ptr, positions_ptr, tables_ptr, table_stride, keys_ptr, values_ptr,
    out_ptr, sums_ptr, scale, kv_heads, tokens,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A program for each tile, head of keys and split of what is seen: the tile's tokens times the
    heads of the group are rows of one matrix of queries, for which every block of keys and values
    is read once.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    table = tables_ptr + tl.load(tiles_ptr + tile * 3 + 2).to(tl.int64) * table_stride
    dims = tl.arange(0, DIM)
    # Row r of the matrix is head r % GROUP of the group, of the tile's token r // GROUP.
    rows = tl.arange(0, ROWS)
    token = rows // GROUP
    exists = token < count
    head = kv_head * GROUP + rows % GROUP
    at = first + token
    q = tl.load(
        qkv_ptr + at[:, None] * stride + head[:, None] * DIM + dims[None, :],
        mask=exists[:, None], other=0.0,
    )  # fmt: skip
    position = tl.load(positions_ptr + at, mask=exists, other=0)

    highest = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    end = tl.load(positions_ptr + first + count - 1) + 1
    begin = end * 0
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions_ptr + first) - WINDOW + 1, 0) // BLOCK * BLOCK
    if SPLITS > 1:
        each = tl.cdiv(tl.cdiv(end - begin, BLOCK), SPLITS) * BLOCK
        begin += split * each
        end = tl.minimum(end, begin + each)
    for start in range(begin, end, BLOCK):
        page = tl.load(table + start // PAGE).to(tl.int64)
        seen = start + tl.arange(0, BLOCK)
        inside = (page * kv_heads + kv_head) * PAGE + seen % PAGE
        block = inside[:, None] * DIM + dims[None, :]
        written = (seen < end)[:, None]  # behind the end lies anything, NaN too
        k = tl.load(keys_ptr + block, mask=written, other=0.0)
        v = tl.load(values_ptr + block, mask=written, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = seen[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (seen[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        highest = new_highest
    place = at * (kv_heads * GROUP) + head
    if SPLITS > 1:
        place += split.to(tl.int64) * tokens * kv_heads * GROUP
        tl.store(sums_ptr + place * 2, highest, mask=exists)
        tl.store(sums_ptr + place * 2 + 1, total, mask=exists)
    else:
        acc = acc / tl.where(exists, total, 1.0)[:, None]
    out = out_ptr + place[:, None] * DIM + dims[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _join_kernel(
    parts_ptr, sums_ptr, out_ptr, places, DIM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A program for each token and head: its splits, each brought to the highest score of all."""
    place = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM)
    of_splits = place + tl.arange(0, SPLITS) * places
    highest = tl.load(sums_ptr + of_splits * 2)
    share = tl.exp2(highest - tl.max(highest, axis=0))
    total = tl.sum(tl.load(sums_ptr + of_splits * 2 + 1) * share, axis=0)
    parts = tl.load(parts_ptr + of_splits[:, None] * DIM + dims[None, :])
    joined = tl.sum(parts * share[:, None], axis=0) / total
    tl.store(out_ptr + place * DIM + dims, joined.to(out_ptr.dtype.element_ty))


@triton.jit
def _add_adapters_kernel(
    out_ptr, out_stride, inner_ptr, inner_stride, up_ptr, adapters_ptr, row_scale_ptr, scale_ptr,
    bias_ptr, count, outputs, end_1, end_2, blocks_1, blocks_2,
    ADAPTERS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, IS_NARROW: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a block of one module's outputs and some rows; adapters that none of these rows
    has are passed over. `end_1` and `end_2` are where the outputs of the second and third module
    begin, `blocks_1` and `blocks_2` the number of the first block of each. After a product of fp8
    factors (IS_NARROW) outputs and inner products lack the factors of their row and column, and
    the bias."""
    block = tl.program_id(0)
    in_2, in_3 = block >= blocks_1, block >= blocks_2
    module = in_2.to(tl.int32) + in_3.to(tl.int32)
    begin = tl.where(in_3, end_2, tl.where(in_2, end_1, 0))
    end = tl.where(in_3, outputs, tl.where(in_2, end_2, end_1))
    first_block = tl.where(in_3, blocks_2, tl.where(in_2, blocks_1, 0))
    columns = begin + (block - first_block) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row, is_column = rows < count, columns < end
    at = out_ptr + rows[:, None] * out_stride + columns[None, :]
    mask = is_row[:, None] & is_column[None, :]
    value = tl.load(at, mask=mask, other=0.0)
    dtype = value.dtype
    wide = value.to(tl.float32)
    row_scale = 1.0
    if IS_NARROW:
        row_scale = tl.load(row_scale_ptr + rows, mask=is_row, other=0.0)[:, None]
        wide *= row_scale * tl.load(scale_ptr + columns, mask=is_column, other=0.0)[None, :]
        if HAS_BIAS:
            wide += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    adapter = tl.load(adapters_ptr + rows, mask=is_row, other=-1)
    ranks = tl.arange(0, RANK_BLOCK)
    for index in range(ADAPTERS):
        own = adapter == index
        if tl.max(own.to(tl.int32), axis=0) > 0:
            for start in range(0, RANK, RANK_BLOCK):
                inner = (module * ADAPTERS + index) * RANK + start + ranks
                low = tl.load(
                    inner_ptr + rows[:, None] * inner_stride + inner[None, :],
                    mask=own[:, None], other=0.0,
                )  # fmt: skip
                if IS_NARROW:
                    factors = row_scale * tl.load(scale_ptr + outputs + inner)[None, :]
                    low = (low.to(tl.float32) * factors).to(dtype)
                up = tl.load(
                    up_ptr + (index * RANK + start + ranks)[:, None] * outputs + columns[None, :],
                    mask=is_column[None, :], other=0.0,
                )  # fmt: skip
                wide += tl.dot(low, up, input_precision="ieee")
    tl.store(at, wide.to(dtype), mask=mask)


@triton.jit
def _narrow_kernel(x_ptr, stride, out_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    """A program for each row, in two passes: the largest magnitude, then the quotients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        mask = start + columns < size
        x = tl.load(x_ptr + row * stride + start + columns, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    scale = tl.maximum(tl.max(largest, axis=0), 1e-12) / 448.0  # the largest number of e4m3
    tl.store(scale_ptr + row, scale)
    for start in range(0, size, BLOCK):
        mask = start + columns < size
        x = tl.load(x_ptr + row * stride + start + columns, mask=mask, other=0.0)
        narrow = (x.to(tl.float32) / scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * size + start + columns, narrow, mask=mask)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `torch_ops`."""
    return _norm(None, x, norm, None)


def add_norm(x: Tensor, residual: Tensor, norm: Norm, post: Norm | None = None) -> Tensor:
    """See `torch_ops`."""
    return _norm(x, residual, norm, post)


def _norm(x: Tensor | None, residual: Tensor, norm: Norm, post: Norm | None) -> Tensor:
    rows, size = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(rows,)](
        residual if x is None else x, 0 if x is None else x.stride(0), residual,
        norm.weight if post is None else post.weight, norm.weight, out, size,
        norm.eps if post is None else post.eps, norm.eps,
        HAS_X=x is not None, HAS_POST=post is not None, FROM_ONE=norm.from_one, BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return out


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """See `torch_ops`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = 1024
    grid = (triton.cdiv(size, block), rows)
    is_silu = activation == "silu"
    _gated_kernel[grid](gate_up, gate_up.stride(0), out, size, IS_SILU=is_silu, BLOCK=block)
    return out


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: TokenBatch,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Norm, Norm] | None,
) -> None:
    """See `torch_ops`."""
    _, kv_heads, page_size, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query, key = norms or (Norm(qkv, 0.0), Norm(qkv, 0.0))
    _rotate_and_store_kernel[(len(qkv), heads + kv_heads)](
        qkv, qkv.stride(0), cos, sin, batch.positions, batch.slots, keys, values,
        query.weight, key.weight, query.eps, key.eps, heads, kv_heads,
        HAS_NORM=norms is not None, FROM_ONE=query.from_one, DIM=dim, PAGE=page_size, num_warps=1,
    )  # fmt: skip


def attend(
    qkv: Tensor, batch: TokenBatch, keys: Tensor, values: Tensor, scale: float, window: int
) -> Tensor:
    """See `torch_ops`."""
    _, kv_heads, page_size, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    group, tokens = heads // kv_heads, len(qkv)
    out = qkv.new_empty(tokens, heads * dim)
    rows = max(16, triton.next_power_of_2(batch.tile_tokens * group))
    # A block of keys and one of values, each in several stages, must fit into shared memory.
    block = min(64 if dim * qkv.element_size() <= 256 else 32, page_size)
    splits = _splits(len(batch.tiles) * kv_heads) if batch.tile_tokens == 1 else 1
    parts = sums = out
    if splits > 1:
        parts = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(splits, tokens, heads, 2, dtype=torch.float32, device=qkv.device)
    _attend_kernel[(len(batch.tiles), kv_heads, splits)](
        qkv, qkv.stride(0), batch.tiles, batch.positions, batch.tables, batch.tables.stride(0),
        keys, values, parts, sums, scale * LOG2_E, kv_heads, tokens,
        WINDOW=window, GROUP=group, ROWS=rows, DIM=dim, PAGE=page_size, BLOCK=block, SPLITS=splits,
        num_warps=4, num_stages=3 if block == 64 else 2,
    )  # fmt: skip
    if splits > 1:
        places = tokens * heads
        _join_kernel[(places,)](parts, sums, out, places, DIM=dim, SPLITS=splits, num_warps=1)
    return out


def _splits(programs: int) -> int:
    """Into how many parts to split what each program reads, so that there are enough of them."""
    splits = 1
    while splits < MOST_SPLITS and programs * splits < ENOUGH_PROGRAMS:
        splits *= 2
    return splits


def add_adapters(
    out: Tensor, inner: Tensor, up: Tensor, adapters: Tensor, rank: int, outputs: Sequence[int]
) -> None:
    """See `torch_ops`; at most three modules."""
    _finish(out, inner, up, adapters, rank, outputs, None, None)


def _finish(
    out: Tensor,
    inner: Tensor,
    up: Tensor,
    adapters: Tensor,
    rank: int,
    outputs: Sequence[int],
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> None:
    """What is left to do after the large product, in place."""
    count, total = out.shape
    block = 128
    ends, blocks = [0], [0]
    for size in outputs:
        ends.append(ends[-1] + size)
        blocks.append(blocks[-1] + triton.cdiv(size, block))
    # What is not there begins behind everything.
    end_1, end_2 = ends[1], ends[2] if len(outputs) > 1 else total
    blocks_1 = blocks[1] if len(outputs) > 1 else blocks[-1] + 1
    blocks_2 = blocks[2] if len(outputs) > 2 else blocks[-1] + 1
    rows = 16 if count <= 16 else 32
    row_scale, scale = scales or (out, out)
    _add_adapters_kernel[(blocks[-1], triton.cdiv(count, rows))](
        out, out.stride(0), inner, inner.stride(0), up, adapters, row_scale, scale,
        out if bias is None else bias, count, total, end_1, end_2, blocks_1, blocks_2,
        ADAPTERS=len(up) // rank if rank else 0, RANK=rank,
        RANK_BLOCK=32 if rank % 32 == 0 else 16, IS_NARROW=scales is not None,
        HAS_BIAS=bias is not None, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


def narrow_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    up: Tensor,
    adapters: Tensor,
    rank: int,
    outputs: Sequence[int],
) -> Tensor:
    """See `torch_ops`.

    The product itself has no factors: with one for each row cuBLAS takes tiles of 128 rows, and 1.6
    times as long for 32 rows. The kernel that adds the adapters multiplies by them.
    """
    rows, size = x.shape
    narrow = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _narrow_kernel[(rows,)](x, x.stride(0), narrow, row_scale, size, BLOCK=4096, num_warps=8)
    one = _one(x.device)
    both = torch._scaled_mm(
        narrow, weight.T, scale_a=one, scale_b=one, out_dtype=x.dtype, use_fast_accum=True
    )
    out, inner = both[:, : sum(outputs)], both[:, sum(outputs) :]
    _finish(out, inner, up, adapters, rank, outputs, (row_scale, scale), bias)
    return out


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
