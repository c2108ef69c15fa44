"""Linear layers over one input as one matrix product, the adapters' first halves included.

A LoRA adds B(Ax). The rows of every adapter's A lie behind the rows of the weight, so that one
product gives both Wx and Ax, and a second, small kernel adds each row's own B(Ax). A decode step
reads a weight at the memory's rate; 32 rows more on thousands cost nothing that can be measured,
where products of their own cost a kernel and its reduction each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openweights.generation.cuda.torch_ops import narrowed

RANK_STEP = 16  # what tensor cores take at least
QUANTIZED = ("Linear4bit", "Linear8bitLt")


class UnsupportedModelError(Exception):
    """The model is not one that this decoder computes; the message says why."""


class FusedLinear:
    """Linear layers over the same input, with the LoRA adapters that they carry.

    The modules' weights become views of one tensor: same values, held once. Quantised weights stay
    what they are, and are multiplied by their own modules.

    Args:
        modules: Plain, quantised by bitsandbytes, or one of these wrapped by peft.
        adapters: Names, in the order in which rows count them.
        dtype: Of inputs and outputs.
        ops: `torch_ops` or `triton_ops`.
        narrow: Keep a copy of the weights in fp8, for products that ask for it.

    Raises:
        UnsupportedModelError: Weights or adapters that cannot be computed here.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        adapters: Sequence[str],
        dtype: torch.dtype,
        ops: Any,
        *,
        narrow: bool,
    ) -> None:
        self._ops = ops
        self._bases = [_base_linear(module) for module in modules]
        self._outputs = [int(base.out_features) for base in self._bases]
        self._width = sum(self._outputs)
        self._adapters = [[_adapter(module, name) for name in adapters] for module in modules]
        ranks = [a.down.out_features for own in self._adapters for a in own if a is not None]
        self._rank = -(-max(ranks, default=0) // RANK_STEP) * RANK_STEP
        inner = len(modules) * len(adapters) * self._rank
        self._is_plain = all(type(base) is nn.Linear for base in self._bases)
        if self._is_plain and any(base.weight.dtype != dtype for base in self._bases):
            raise UnsupportedModelError("weights of several types")
        if self._is_plain:
            self._weight = _joined_weights(self._bases, inner)
            self._bias = _joined_bias(self._bases, inner)
            self._down = self._weight[self._width :]
        else:
            device = self._bases[0].weight.device
            shape = (inner, int(self._bases[0].in_features))
            self._down = torch.zeros(shape, dtype=dtype, device=device)
        self._up = self._down.new_zeros(len(adapters) * self._rank, self._width)
        self._narrow = narrowed(self._weight) if narrow and self._is_plain else None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters' current weights, in place: captured graphs see them."""
        column = 0
        for module, own in enumerate(self._adapters):
            columns = slice(column, column := column + self._outputs[module])
            for index, adapter in enumerate(own):
                if adapter is not None:
                    rank, at = adapter.down.out_features, (module * len(own) + index) * self._rank
                    self._down[at : at + rank].copy_(adapter.down.weight)
                    at = index * self._rank
                    up = adapter.up.weight.T * adapter.scaling
                    self._up[at : at + rank, columns].copy_(up)
        if self._narrow is not None and self._rank:
            for kept, new in zip(self._narrow, narrowed(self._down), strict=True):
                kept[self._width :].copy_(new)

    def __call__(self, x: Tensor, adapters: Tensor, *, narrow: bool = False) -> Tensor:
        """Outputs side by side, shape (T, O).

        Args:
            x: Shape (T, I).
            adapters: Index of each row's adapter, shape (T,); below 0 for none.
            narrow: Multiply by the copy in fp8, where there is one.
        """
        if not self._is_plain:
            out = torch.cat([base(x) for base in self._bases], dim=-1)
            inner = F.linear(x, self._down)
        else:
            if narrow and self._narrow is not None:
                adapted = (self._up, adapters, self._rank, self._outputs)
                return self._ops.narrow_linear(x, *self._narrow, self._bias, *adapted)
            both = F.linear(x, self._weight, self._bias)
            out, inner = both[:, : self._width], both[:, self._width :]
        if self._rank:
            self._ops.add_adapters(out, inner, self._up, adapters, self._rank, self._outputs)
        return out


@dataclass(frozen=True, slots=True)
class _Adapter:
    down: nn.Linear
    up: nn.Linear
    scaling: float


def _base_linear(module: Any) -> Any:
    """The linear layer itself, plain or quantised."""
    linear = getattr(module, "base_layer", module)
    if type(linear) is nn.Linear or type(linear).__name__ in QUANTIZED:
        return linear
    raise UnsupportedModelError(f"weights of kind {type(linear).__name__}")


def _adapter(module: Any, name: str) -> _Adapter | None:
    """The layer's part of an adapter; None when it has none."""
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A"):
        raise UnsupportedModelError(f"adapters of kind {type(module).__name__}")
    if module.merged:
        raise UnsupportedModelError("a merged adapter")
    if name not in module.lora_A:
        return None
    if name in module.lora_variant or module.lora_bias[name]:
        raise UnsupportedModelError(f"adapter {name}: DoRA or another variant, or with bias")
    return _Adapter(module.lora_A[name], module.lora_B[name], module.scaling[name])


@torch.no_grad()
def _joined_weights(bases: Sequence[nn.Linear], more: int) -> Tensor:
    """One tensor of all weights, which become views of it, with `more` rows of zeros behind."""
    first = bases[0].weight
    if len(bases) == 1 and not more:
        return first.data
    sizes = [len(base.weight) for base in bases]
    joined = first.new_zeros(sum(sizes) + more, first.shape[1])
    for base, part in zip(bases, joined.split([*sizes, more]), strict=False):
        part.copy_(base.weight)
        base.weight.data = part
    return joined


@torch.no_grad()
def _joined_bias(bases: Sequence[nn.Linear], more: int) -> Tensor | None:
    """The same for biases, which stay shared: a trained one is read where it is trained."""
    present = [base.bias for base in bases if base.bias is not None]
    if not present:
        return None
    if len(present) < len(bases):
        raise UnsupportedModelError("projections of which only some have a bias")
    sizes = [len(bias) for bias in present]
    joined = present[0].new_zeros(sum(sizes) + more)
    for bias, part in zip(present, joined.split([*sizes, more]), strict=False):
        part.copy_(bias)
        bias.data = part
    return joined
