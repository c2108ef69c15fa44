"""Norms and gated activations of a layer and their gradients, in Triton; imported on CUDA only.

`layers.py` defines what is computed. Each tensor is read and written once, where separate
operations would do so three to ten times; sums are in float32, and values are rounded where the
modules of transformers round them.
"""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a program that computes each by itself


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, factor_ptr, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = (x * factor).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (normed * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + columns, out, mask=mask)
    tl.store(factor_ptr + row, factor)


@triton.jit
def _norm_grad_kernel(
    grad_ptr, x_ptr, weight_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + row)
    normed = x * factor
    along = tl.sum(grad * normed, axis=0) / size
    out = (factor * (grad - normed * along)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + columns, out, mask=mask)


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    gate = tl.load(gate_ptr + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=mask, other=0.0).to(tl.float32)
    opened = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + places, (opened * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_grad_kernel(
    grad_ptr, gate_ptr, up_ptr, gate_grad_ptr, up_grad_ptr, count, BLOCK: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    up_grad = (grad * gate * share).to(up_grad_ptr.dtype.element_ty)
    gate_grad = grad * up * share * (1 + gate * (1 - share))
    tl.store(up_grad_ptr + places, up_grad, mask=mask)
    tl.store(gate_grad_ptr + places, gate_grad.to(gate_grad_ptr.dtype.element_ty), mask=mask)


def norm_kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`weight * x / rms(x)` of contiguous rows (N, H), and 1 / rms(x) of each in float32, (N,)."""
    rows, size = x.shape
    out, factors = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        _norm_kernel[(rows,)](
            x, weight, out, factors, size, eps,
            BLOCK=triton.next_power_of_2(size), num_warps=8,
        )  # fmt: skip
    return out, factors


def norm_grad_kernel(grad: Tensor, x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    """Gradient of contiguous rows (N, H) from that of `norm_kernel`'s output."""
    rows, size = x.shape
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        _norm_grad_kernel[(rows,)](
            grad, x, weight, factors, out, size,
            BLOCK=triton.next_power_of_2(size), num_warps=8,
        )  # fmt: skip
    return out


def gated_kernel(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of contiguous tensors of one shape."""
    out, count = torch.empty_like(gate), gate.numel()
    with torch.cuda.device(gate.device):
        _gated_kernel[(triton.cdiv(count, BLOCK),)](gate, up, out, count, BLOCK=BLOCK)
    return out


def gated_grad_kernel(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of `gated_kernel`'s output; all contiguous."""
    gate_grad, up_grad, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    with torch.cuda.device(gate.device):
        _gated_grad_kernel[(triton.cdiv(count, BLOCK),)](
            grad, gate, up, gate_grad, up_grad, count, BLOCK=BLOCK
        )
    return gate_grad, up_grad
