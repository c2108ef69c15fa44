"""A linear layer and its LoRA in one autograd function.

peft's forward under autocast copies a layer's input to the adapter's float32 and back, and makes a
tensor of its own for the product with B, for its scaling and for the sum: about 1 MB a token in
each layer of a 7 B model, which is read and written for nothing. Here both products with B add into
the output of the base layer, and backward keeps the input alone. The numbers are those of peft, to
rounding: under autocast peft's products run in the base layer's type, too.

A base in 4 bit (QLoRA, arXiv 2305.14314) is made dense for a product and let go of again, once on
the way forward and once on the way back, whatever the number of rows.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openweights.models.forward import HALF


def fuse_lora(model: nn.Module) -> int:
    """Let every LoRA layer of `model` compute as here where it can; how many layers that are.

    A layer decides at each call: with dropout, DoRA, several adapters, merged weights, a base of 8
    bit or one that is trained, it computes as peft does.
    """
    kinds = _kinds()
    layers = [module for module in model.modules() if type(module) in kinds]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


@cache
def _kinds() -> tuple[type, ...]:
    """peft's layers over dense weights and over those in 4 bit."""
    if not is_bnb_4bit_available():
        return (Linear,)
    from peft.tuners.lora.bnb import Linear4bit

    return Linear, Linear4bit


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    operands = None if args or kwargs else lora_operands(layer, x)
    if operands is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return LoraLinear.apply(x.to(_compute_dtype(x)), *operands)  # type: ignore[no-any-return]


class LoraOperands(NamedTuple):
    """What a LoRA layer multiplies with.

    Attributes:
        weight: Of the frozen base, shape (O, I), or packed.
        quant_state: How bitsandbytes packed it in 4 bit; None for a dense one.
        bias: Shape (O,), or None.
        a: Shape (r, I).
        b: Shape (O, r).
        scaling: Factor on their product.
    """

    weight: Tensor
    quant_state: Any
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


def lora_operands(layer: nn.Module, x: Tensor) -> LoraOperands | None:
    """Those of a layer for an input `x`; None where it is to compute as peft does, or is no LoRA
    layer.
    """
    if type(layer) not in _kinds():
        return None
    lora: Any = layer
    adapter = _only_adapter(lora)
    if adapter is None or not _computes_in(_compute_dtype(x), lora, adapter, x):
        return None
    base = lora.base_layer
    a, b = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
    return LoraOperands(base.weight, _quant_state(base), base.bias, a, b, lora.scaling[adapter])


def _only_adapter(layer: Any) -> str | None:
    """The adapter that counts, if it is one alone, plain, and neither switched off nor merged."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    dropout = layer.lora_dropout[names[0]]
    drops = layer.training and not isinstance(dropout, nn.Identity)
    return None if drops or layer.lora_B[names[0]].bias is not None else names[0]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of products, or the type of `x` without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _computes_in(dtype: torch.dtype, layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether base and adapter both compute in `dtype`, and the base is frozen.

    Without autocast an adapter of a wider type computes in that type.
    """
    base = layer.base_layer
    is_packed = type(layer) is not Linear and _quant_state(base) is not None
    if type(base) is not nn.Linear and not is_packed:
        return False
    own = base.compute_dtype if is_packed else base.weight.dtype
    if own != dtype or base.weight.requires_grad:
        return False
    if base.bias is not None and base.bias.requires_grad:
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    return autocast or layer.lora_A[adapter].weight.dtype == dtype


def _quant_state(base: nn.Module) -> Any:
    """How bitsandbytes packed the weight of a layer in 4 bit, beside it; None for a dense one."""
    return getattr(base.weight, "quant_state", None)


def _dense(weight: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix (O, I) in `dtype`."""
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.view(-1, 1), quant_state).to(dtype)  # type: ignore[no-any-return]


class LoraLinear(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T`, with gradients for x, A and B.

    Shapes: x (…, I), weight (O, I), bias (O,) or None, a (r, I), b (O, r); the output (…, O) has
    the type of x. A and B may be wider; their gradients have their own type. With a `quant_state`
    of bitsandbytes the weight is packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        quant_state: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        operands = LoraOperands(weight, quant_state, bias, a.to(x.dtype), b.to(x.dtype), scaling)
        out, inner = lora_product(rows, operands)
        ctx.save_for_backward(rows, inner, weight, operands.a, operands.b)
        ctx.quant_state, ctx.scaling = quant_state, scaling
        ctx.adapter_dtype, ctx.shape = a.dtype, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, low, up = ctx.saved_tensors
        operands = LoraOperands(weight, ctx.quant_state, None, low, up, ctx.scaling)
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_a, grad_b = lora_gradients(
            grad, rows, inner, operands, dtype=ctx.adapter_dtype, needs_rows=needs_x
        )
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, None, grad_a, grad_b, None


def lora_product(rows: Tensor, operands: LoraOperands) -> tuple[Tensor, Tensor]:
    """The layer's output (N, O), and `rows @ a.T` (N, r), for operands of the type of the rows."""
    weight, quant_state, bias, a, b, scaling = operands
    inner = rows @ a.T
    out = nn.functional.linear(rows, _dense(weight, quant_state, rows.dtype), bias)
    return out.addmm_(inner, b.T, alpha=scaling), inner


def lora_gradients(
    grad: Tensor,
    rows: Tensor,
    inner: Tensor,
    operands: LoraOperands,
    *,
    dtype: torch.dtype,
    needs_rows: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the rows (N, I), if they are needed, and of a and b, from that of the output.

    Args:
        grad: Shape (N, O).
        inner: As `lora_product` returned it.
        dtype: Of the gradients of a and b.
    """
    weight, quant_state, _, a, b, scaling = operands
    # Each operation less is time that a GPU waits for: a small model's step is bound by them.
    through = torch.addmm(inner, grad, b, beta=0, alpha=scaling)
    grad_rows = None
    if needs_rows:
        grad_rows = (grad @ _dense(weight, quant_state, grad.dtype)).addmm_(through, a)
    grad_b = _product(grad.T, inner, dtype)
    if scaling != 1:
        grad_b.mul_(scaling)
    return grad_rows, _product(through.T, rows, dtype), grad_b


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in `dtype`; a GPU sums in float32, and leaves it so."""
    if left.is_cuda and left.dtype in HALF and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
