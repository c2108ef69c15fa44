"""`torch_ops` in Triton; imported on CUDA only."""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, size, eps, HAS_X: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(residual_ptr + row * size + columns, mask=mask, other=0.0)
    if HAS_X:
        value = value + tl.load(x_ptr + row * size + columns, mask=mask, other=0.0)
        tl.store(residual_ptr + row * size + columns, value, mask=mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    normed = (wide * scale).to(value.dtype) * weight
    tl.store(out_ptr + row * size + columns, normed, mask=mask)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * size + columns, silu * up, mask=mask)


@triton.jit
def _normed_head(ptr, weight_ptr, half, eps, HAS_NORM: tl.constexpr, DIM: tl.constexpr):
    """Both halves of one head (or of several, by rows of `ptr`), normed where asked."""
    first = tl.load(ptr + half)
    second = tl.load(ptr + half + DIM // 2)
    if HAS_NORM:
        a, b = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=-1) + tl.sum(b * b, axis=-1)) / DIM + eps)
        if len(first.shape) == 2:
            scale = scale[:, None]
        first = (a * scale).to(first.dtype) * tl.load(weight_ptr + half)
        second = (b * scale).to(first.dtype) * tl.load(weight_ptr + half + DIM // 2)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _rope_attend_kernel(  # noqa: PLR0915 - one kernel, which cannot be cut
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr,
    out_ptr, eps, scale, span, kv_heads,
    HAS_NORM: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each row and key head: its group of queries shares the cache it reads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, HALF)
    dtype = qkv_ptr.dtype.element_ty
    heads = kv_heads * GROUP
    qkv = qkv_ptr + row * (heads + 2 * kv_heads) * DIM
    position = tl.load(positions_ptr + row)
    cos_1 = tl.load(cos_ptr + position * DIM + half)
    sin_1 = tl.load(sin_ptr + position * DIM + half)
    cos_2 = tl.load(cos_ptr + position * DIM + half + HALF)
    sin_2 = tl.load(sin_ptr + position * DIM + half + HALF)

    cache = (row * kv_heads + head) * span * DIM
    k_1, k_2 = _normed_head(qkv + (heads + head) * DIM, k_norm_ptr, half, eps, HAS_NORM, DIM)
    new_k_1 = (k_1 * cos_1 - k_2 * sin_1).to(dtype)
    new_k_2 = (k_2 * cos_2 + k_1 * sin_2).to(dtype)
    value = qkv + (heads + kv_heads + head) * DIM
    new_v_1, new_v_2 = tl.load(value + half), tl.load(value + half + HALF)
    at = cache + position * DIM + half
    tl.store(keys_ptr + at, new_k_1)
    tl.store(keys_ptr + at + HALF, new_k_2)
    tl.store(values_ptr + at, new_v_1)
    tl.store(values_ptr + at + HALF, new_v_2)

    group = tl.arange(0, GROUP_PAD)
    # Rows past the group repeat its last query: their results are not stored.
    member = tl.minimum(group, GROUP - 1)
    queries = qkv + (head * GROUP + member)[:, None] * DIM
    q_1, q_2 = _normed_head(queries, q_norm_ptr, half[None, :], eps, HAS_NORM, DIM)
    rot_1 = (q_1 * cos_1[None, :] - q_2 * sin_1[None, :]).to(dtype)
    rot_2 = (q_2 * cos_2[None, :] + q_1 * sin_2[None, :]).to(dtype)

    # The new token first: its key and value are here already, and it starts the running softmax.
    own = tl.sum(rot_1.to(tl.float32) * new_k_1.to(tl.float32)[None, :], axis=1)
    own += tl.sum(rot_2.to(tl.float32) * new_k_2.to(tl.float32)[None, :], axis=1)
    highest = own * scale
    total = tl.full([GROUP_PAD], 1.0, tl.float32)
    acc_1 = tl.zeros([GROUP_PAD, HALF], tl.float32) + new_v_1.to(tl.float32)[None, :]
    acc_2 = tl.zeros([GROUP_PAD, HALF], tl.float32) + new_v_2.to(tl.float32)[None, :]
    for start in range(0, position, BLOCK):
        seen = start + tl.arange(0, BLOCK)
        inside = seen < position
        block = cache + seen[:, None] * DIM + half[None, :]
        key_1 = tl.load(keys_ptr + block, mask=inside[:, None], other=0.0)
        key_2 = tl.load(keys_ptr + block + HALF, mask=inside[:, None], other=0.0)
        scores = tl.dot(rot_1, tl.trans(key_1), input_precision="ieee")
        scores += tl.dot(rot_2, tl.trans(key_2), input_precision="ieee")
        scores = tl.where(inside[None, :], scores * scale, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        value_1 = tl.load(values_ptr + block, mask=inside[:, None], other=0.0)
        value_2 = tl.load(values_ptr + block + HALF, mask=inside[:, None], other=0.0)
        acc_1 = acc_1 * shrink[:, None]
        acc_1 += tl.dot(weights.to(dtype), value_1, input_precision="ieee")
        acc_2 = acc_2 * shrink[:, None]
        acc_2 += tl.dot(weights.to(dtype), value_2, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        highest = new_highest
    target = out_ptr + row * heads * DIM + (head * GROUP + group)[:, None] * DIM + half[None, :]
    stored = (group < GROUP)[:, None]
    tl.store(target, (acc_1 / total[:, None]).to(dtype), mask=stored)
    tl.store(target + HALF, (acc_2 / total[:, None]).to(dtype), mask=stored)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `torch_ops`."""
    return _norm(None, x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `torch_ops`."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, size = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(rows,)](
        residual if x is None else x, residual, weight, out, size, eps,
        HAS_X=x is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `torch_ops`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = 1024
    _silu_mul_kernel[(triton.cdiv(size, block), rows)](gate_up, out, size, BLOCK=block)
    return out


def rope_attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See `torch_ops`."""
    rows, kv_heads, span, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    group = heads // kv_heads
    out = qkv.new_empty(rows, heads * dim)
    has_norm = q_norm is not None
    # A block of keys and one of values, each in several stages, must fit into shared memory.
    block = 64 if dim * qkv.element_size() <= 256 else 32
    _rope_attend_kernel[(rows, kv_heads)](
        qkv, cos, sin, positions, keys, values,
        q_norm if has_norm else qkv, k_norm if has_norm else qkv,
        out, eps, dim**-0.5, span, kv_heads,
        HAS_NORM=has_norm, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        DIM=dim, BLOCK=block, num_warps=4, num_stages=3 if block == 64 else 2,
    )  # fmt: skip
    return out
