"""The fused operations of the decoder in plain torch: what each one computes.

`triton_ops` is tested against these. T is the number of tokens of a pass (each row of a decode step
has one), O outputs, D the size of a head, Q and K the heads of queries and of keys. Rows may be
strided, as views of a wider matrix are. Normalisation, rotation and attention work in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openweights.generation.cuda.batch import TokenBatch
from openweights.generation.selection import Rows, log_probs, select


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm; Gemma's weight counts from 1, and multiplies before rounding."""

    weight: Tensor
    eps: float
    from_one: bool = False


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Root-mean-square norm of each row, shape (T, H)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.from_one:
        return (wide * (1.0 + norm.weight.float())).to(x.dtype)
    return (norm.weight * wide.to(x.dtype)).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, norm: Norm, post: Norm | None = None) -> Tensor:
    """residual += post(x), in place; returns the norm of the sum. Shapes (T, H)."""
    residual.add_(x if post is None else rms_norm(x, post))
    return rms_norm(residual, norm)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for (T, 2 I) holding both side by side; shape (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: TokenBatch,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Norm, Norm] | None,
) -> None:
    """Norm and rotate queries in place; norm, rotate and store keys, and store values.

    Args:
        qkv: Shape (T, (Q + 2 K) D); its queries are overwritten.
        cos, sin: Rotary tables of half a head, shape (S, D / 2).
        keys, values: Pages of a layer, shape (pages, K, page size, D); written at `batch.slots`.
        norms: Of each head of queries, and of keys, where the architecture has them.
    """
    _, kv_heads, page_size, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)
    normed_q = q if norms is None else rms_norm(q, norms[0])
    normed_k = k if norms is None else rms_norm(k, norms[1])
    row_cos, row_sin = cos[batch.positions][:, None], sin[batch.positions][:, None]
    page, offset = batch.slots // page_size, batch.slots % page_size
    keys[page, :, offset] = _rotated(normed_k, row_cos, row_sin)
    values[page, :, offset] = v
    q.copy_(_rotated(normed_q, row_cos, row_sin))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in float32, halves rotated as in Llama."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def attend(
    qkv: Tensor, batch: TokenBatch, keys: Tensor, values: Tensor, scale: float, window: int
) -> Tensor:
    """Each token's queries over its sequence up to itself, from the pages.

    Args:
        qkv: Rotated queries in front, shape (T, (Q + 2 K) D).
        keys, values: Shape (pages, K, page size, D).
        window: How many positions a token sees, itself included; 0 for all.

    Returns:
        Shape (T, Q D).
    """
    _, kv_heads, page_size, dim = keys.shape
    pages = batch.tables[batch.rows]  # (T, pages)
    span = pages.shape[1] * page_size
    k, v = (part[pages].transpose(1, 2).flatten(2, 3).float() for part in (keys, values))
    seen = torch.arange(span, device=qkv.device)[None]
    hidden = seen > batch.positions[:, None]
    if window:
        hidden |= seen <= batch.positions[:, None] - window
    q = qkv[:, : qkv.shape[1] - 2 * kv_heads * dim].reshape(len(qkv), kv_heads, -1, dim).float()
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(hidden[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).to(qkv.dtype).reshape(len(qkv), -1)


def add_adapters(
    out: Tensor, inner: Tensor, up: Tensor, adapters: Tensor, rank: int, outputs: Sequence[int]
) -> None:
    """out += what each row's adapter adds, in place.

    Args:
        out: Outputs of M modules side by side, shape (T, O).
        inner: x @ A.T of every module and of every adapter, shape (T, M * adapters * rank).
        up: Scaled B.T of every adapter, shape (adapters * rank, O).
        adapters: Of each row, shape (T,); below 0 for none.
        outputs: Of each module; their sum is O.
    """
    columns = torch.arange(len(up), device=out.device)
    own = columns[None] // rank == adapters[:, None]
    parts = zip(inner.split(len(up), dim=1), up.split(list(outputs), dim=1), strict=True)
    for (low, high), part in zip(parts, out.split(list(outputs), dim=1), strict=True):
        part.addmm_(low * own, high)


def narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in fp8 (e4m3), and the factor of each, shape (rows, 1) in float32."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / largest
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


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
    """x @ W.T + bias with both factors in fp8, and what each row's adapter adds; shape (T, O).

    Args:
        x: Shape (T, I); its rows are narrowed here.
        weight: `narrowed` rows of W and behind them of every A, shape (O + M * adapters * rank, I).
        scale: Their factors, shape (the same, 1).
        bias: Shape (O,) at least.
        up, adapters, rank, outputs: As of `add_adapters`.
    """
    narrow, row_scale = narrowed(x)
    both = ((narrow.float() @ weight.float().T) * row_scale * scale.T).to(x.dtype)
    out, inner = both.split((sum(outputs), len(weight) - sum(outputs)), dim=1)
    if bias is not None:
        out += bias[: sum(outputs)]
    if rank:
        add_adapters(out, inner, up, adapters, rank, outputs)
    return out


def draw(logits: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability, where nothing changes the logits."""
    tokens = select(logits, rows, positions)
    return tokens, log_probs(logits, tokens, rows).float()
