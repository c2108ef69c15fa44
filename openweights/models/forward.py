"""The forward pass by its parts: decoder, hidden states that count, output head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def frozen_head(base: Any) -> Head | None:
    """The output head; None when it is trained, so that student and teacher differ in it."""
    module = base.get_output_embeddings()
    if type(module) is not nn.Linear or any(p.requires_grad for p in module.parameters()):
        return None
    return Head(module.weight, module.bias, *logit_transform(base))


def output_logits(base: Any, hidden: Tensor) -> Tensor:
    """Logits of shape (N, V) in float32 through the model's own head included."""
    scale, softcap = logit_transform(base)
    logits = base.get_output_embeddings()(hidden).float() * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def logit_transform(base: Any) -> tuple[float, float | None]:
    """Factor and soft cap that the architecture applies to its logits; (1, None) for most."""
    config = base.config.get_text_config()
    if config.model_type == "hyperclovax":  # the one that multiplies by what others divide by
        return float(config.logits_scaling), None
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(config, name) or 1.0
    caps = [cap for name in _CAPS if (cap := _number(config, name)) is not None]
    return scale, caps[0] if caps else None


# By the names that configs give them: Cohere, Falcon H1, Muse; Granite and MiniCPM 3, Inkling;
# Gemma, Recurrent Gemma, xLSTM.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) else None


def decoder_of(base: Any) -> Any:
    """The layers of a causal language model, with the embedding before and the norm behind them.

    Llama 4 says that it is its own decoder, and ModernBERT that its output head is.
    """
    found = base.get_decoder()
    is_none = found is base or isinstance(found, nn.Linear)
    return getattr(base, "model", found) if is_none else found


def base_model(model: nn.Module) -> Any:
    """The causal language model itself; inside a `PeftModel` its layers hold the adapters."""
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that a `PeftModel` computes with; None without one."""
    inner: Any = model
    return unquote(inner.active_adapter) if hasattr(inner, "get_base_model") else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside; the model's mode afterwards is what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output head: logits = cap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: Shape (V, H).
        bias: Shape (V,), or None.
        scale: Factor on the logits (Cohere, Granite).
        softcap: cap(z) = softcap * tanh(z / softcap) (Gemma 2); None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def at_temperature(self, temperature: float) -> Head:
        """The head whose logits are these, divided by the temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of shape (N, V) in at least float32, for hidden states of shape (N, H)."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False), _as_given(hidden, self.weight):
            logits = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)  # a copy would be the largest tensor of a step
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T + bias in float32, from the precision of the weight; for kernels that
        apply scale and soft cap themselves.
        """
        hidden = hidden.to(self.weight.dtype)
        if hidden.dtype == torch.float32:
            logits = hidden @ self.weight.T
        else:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        return logits if self.bias is None else logits.add_(self.bias)

    def raw_grad(self, logits: Tensor, logits_grad: Tensor) -> Tensor:
        """Gradient of the logits before scale and soft cap, in the type in which it is multiplied
        with the weight: as the kernels give it. `logits_grad` is overwritten.
        """
        if self.softcap is not None:
            logits_grad.mul_(1 - (logits / self.softcap) ** 2)
        if self.scale != 1.0:
            logits_grad.mul_(self.scale)
        return logits_grad.to(self.grad_dtype(logits_grad.dtype))

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of `raw_grad` for a gradient of this type."""
        return self.weight.dtype if dtype == torch.float32 else dtype

    def grad_through(self, raw_grad: Tensor) -> Tensor:
        """Gradient of the hidden states, shape (N, H), from that of the raw logits."""
        with torch.autocast(raw_grad.device.type, enabled=False):
            return raw_grad @ self.weight.to(raw_grad.dtype)


@contextmanager
def _as_given(*factors: Tensor) -> Iterator[None]:
    """Inside, products on a CPU of what comes from bfloat16 are made from bfloat16, summed and
    given in float32: nothing is lost that was there, and it takes a third of the time.

    The setting is the process's: no other thread may multiply float32 numbers meanwhile, and none
    does, as one thread trains, and one samples.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch has it since 2.9
    is_given = all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in factors)
    if matmul is None or not is_given:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


_CACHED = 2**20  # numbers that stay in a core's caches while they are passed over a few times


def row_groups(logits: Tensor) -> Iterator[slice]:
    """Rows of logits (N, V) to be scored at a time: on a CPU as many as its cache holds, so that
    each pass over them does not go through memory; else all.
    """
    rows, size = logits.shape
    own = max(1, _CACHED * torch.get_num_threads() // size)
    step = own if logits.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, start + step)
