"""What stands between the products of a layer, in few passes over memory: norms, gated MLPs.

The modules of transformers write a tensor for every step of a norm, in float32, and keep four
tensors as wide as an MLP for the backward pass. Here a norm keeps its input and a number a row, and
an MLP its gate and its other branch: what comes of them is made again when the gradient of the
last adapter needs it, as unsloth does. Numbers are rounded where those modules round them.

    norm     y = w * x / rms(x)
    gated    h = silu(g) * u,  dh/du = silu(g),  dh/dg = u * s * (1 + g * (1 - s)),  s = sigmoid(g)
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openweights.models.forward import HALF
from openweights.models.fused.lora_linear import (
    LoraOperands,
    lora_gradients,
    lora_operands,
    lora_product,
)

# Modules of transformers whose forward is `w * x / rms(x)`, and `down(act(gate(x)) * up(x))`.
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}


def fuse_layers(model: nn.Module) -> int:
    """Let norms and gated MLPs compute as here where they can: on CUDA, in half precision, with
    weights of the norm that are not trained. How many modules that are.
    """
    found = 0
    for module in model.modules():
        name = type(module).__name__
        if name in _NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif name in _GATED and _is_silu(module):
            module.forward = MethodType(_mlp_forward, module)
        else:
            continue
        found += 1
    return found


def _is_silu(mlp: Any) -> bool:
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    weight = norm.weight
    if not x.is_cuda or x.dtype not in HALF or weight.dtype != x.dtype or weight.requires_grad:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    return RMSNorm.apply(x, weight, norm.variance_epsilon)  # type: ignore[no-any-return]


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    if not x.is_cuda or x.dtype not in HALF:
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    operands = lora_operands(mlp.down_proj, gate)
    if operands is None:
        return mlp.down_proj(Gated.apply(gate, up))  # type: ignore[no-any-return]
    return GatedLoraLinear.apply(gate, up, *operands)  # type: ignore[no-any-return]


class RMSNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x²) + eps)` over the last axis, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if x.is_cuda:
            from openweights.models.fused.layer_kernels import norm_kernel

            out, factors = norm_kernel(rows, weight, eps)
        else:
            factors = (rows.pow(2).mean(-1) + eps).rsqrt()
            out = weight * (rows * factors[:, None])
        ctx.save_for_backward(rows, weight, factors)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None]:
        rows, weight, factors = ctx.saved_tensors
        grad = grad_out.reshape(rows.shape).contiguous()
        if rows.is_cuda:
            from openweights.models.fused.layer_kernels import norm_grad_kernel

            out = norm_grad_kernel(grad, rows, weight, factors)
        else:
            normed, grad = rows * factors[:, None], grad * weight
            along = (grad * normed).mean(-1, keepdim=True)
            out = factors[:, None] * (grad - normed * along)
        return out.view(grad_out.shape), None, None


class Gated(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        return _gated_gradients(grad_out.contiguous(), *ctx.saved_tensors)


class GatedLoraLinear(torch.autograd.Function):
    """`LoraLinear` of `silu(gate) * up`, which is not kept; shapes as there."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        quant_state: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        operands = LoraOperands(
            weight, quant_state, bias, a.to(gate.dtype), b.to(gate.dtype), scaling
        )
        rows = _gated(gate, up).view(-1, gate.shape[-1])
        out, inner = lora_product(rows, operands)
        ctx.save_for_backward(gate, up, inner, weight, operands.a, operands.b)
        ctx.quant_state, ctx.scaling, ctx.adapter_dtype = quant_state, scaling, a.dtype
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, inner, weight, low, high = ctx.saved_tensors
        operands = LoraOperands(weight, ctx.quant_state, None, low, high, ctx.scaling)
        rows = _gated(gate, up).view(-1, gate.shape[-1])
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_rows, grad_a, grad_b = lora_gradients(
            grad, rows, inner, operands, dtype=ctx.adapter_dtype, needs_rows=True
        )
        del rows
        assert grad_rows is not None
        grad_gate, grad_up = _gated_gradients(grad_rows.view(gate.shape), gate, up)
        return grad_gate, grad_up, None, None, None, grad_a, grad_b, None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if not gate.is_cuda:
        return nn.functional.silu(gate) * up
    from openweights.models.fused.layer_kernels import gated_kernel

    return gated_kernel(gate, up)


def _gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if gate.is_cuda:
        from openweights.models.fused.layer_kernels import gated_grad_kernel

        return gated_grad_kernel(grad, gate, up)
    share = gate.sigmoid()
    return grad * up * share * (1 + gate * (1 - share)), grad * gate * share
