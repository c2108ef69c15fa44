"""The fused operations of a decode step: in Triton for CUDA, and the same in plain torch.

`torch_ops` defines what each computes, and is what the Triton ones are tested against. Every
operation takes N rows; normalisation, rotation and attention work in float32 inside.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openweights.generation.cuda.decoder import head_norm, rotate

# ---- plain torch


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row, shape (N, H)."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns the norm of the sum. Shapes (N, H)."""
    residual.add_(x)
    return _rms_norm(residual, weight, eps)


def _silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for (N, 2 I) holding both side by side; shape (N, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rope_attend(
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
    """Rotate, write the cache at each row's position, attend to positions up to it.

    Args:
        qkv: Queries, keys and values of one token a row, shape (N, (Q + 2 K) D).
        cos, sin: Rotary tables, shape (S, D).
        positions: Shape (N,).
        keys, values: Cache, shape (N, K, S, D); written.

    Returns:
        Shape (N, Q D).
    """
    rows, kv_heads, span, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = qkv.view(rows, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    q, k = head_norm(q, q_norm, eps), head_norm(k, k_norm, eps)
    row_cos, row_sin = cos[positions][:, None], sin[positions][:, None]
    q, k = rotate(q, row_cos, row_sin), rotate(k, row_cos, row_sin)
    every = torch.arange(rows, device=qkv.device)
    keys[every, :, positions] = k
    values[every, :, positions] = v
    behind = torch.arange(span, device=qkv.device)[None] > positions[:, None]
    grouped = q.view(rows, kv_heads, -1, dim).float()
    scores = grouped @ keys.float().transpose(2, 3) * dim**-0.5  # (N, K, Q / K, S)
    weights = scores.masked_fill(behind[:, None, None], float("-inf")).softmax(-1)
    return (weights @ values.float()).to(qkv.dtype).reshape(rows, -1)


torch_ops: Any = SimpleNamespace(
    rms_norm=_rms_norm,
    add_rms_norm=_add_rms_norm,
    silu_mul=_silu_mul,
    rope_attend=_rope_attend,
)
