"""Copies of the weights that are trained: to measure against, and to compute with in their place.

Exchanging is done by storage, which copies nothing, or, where the copy is on another device, tensor
by tensor, so that the model's device never holds both. A backward pass must not run in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openweights.models.forward import evaluating


class WeightCopy:
    """The trainable parameters of a model as they are now, in float32 or better.

    Attributes:
        names: Of the parameters.
        parameters: Those of the model.
        values: The copy of each.
    """

    def __init__(self, model: nn.Module, device: str | None = None) -> None:
        """Copies to `device`; None for where the parameters are."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no trainable parameter, so there is nothing to copy")
        self.names = list(named)
        self.parameters = list(named.values())
        self.values = [_copied(p, device) for p in self.parameters]

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The model holds the copy inside, and bit for bit its own weights afterwards."""
        exchange = self._by_copy if self.is_elsewhere else self._by_storage
        with exchange():
            yield

    @property
    def is_elsewhere(self) -> bool:
        """Whether the copy is on another device than the model."""
        return self.values[0].device != self.parameters[0].device

    @contextmanager
    def _by_storage(self) -> Iterator[None]:
        own = [p.data for p in self.parameters]
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data = value.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    @contextmanager
    def _by_copy(self) -> Iterator[None]:
        pairs = zip(self.parameters, self.values, strict=True)
        own = [p.detach().to(v.device, copy=True) for p, v in pairs]
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def distance(self) -> float:
        """Euclidean distance of the model's weights from the copy."""
        pairs = zip(self.parameters, self.values, strict=True)
        return norm([p.to(v.device, v.dtype) - v for p, v in pairs])

    def norm(self) -> float:
        """Euclidean norm of the copy."""
        return norm(self.values)


@contextmanager
def keeping_precision(model: nn.Module) -> Iterator[None]:
    """What is trained has its own values and type afterwards.

    trl's trainers round adapters over a base in 4 bit to bfloat16, in which an update of less than
    a 256th of a weight is lost.
    """
    own = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in own:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)  # where a trainer may have moved it


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of tensors of one device, taken together."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().norm().item()


def _copied(parameter: nn.Parameter, device: str | None) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(device or parameter.device, dtype, copy=True)


class Reference:
    """The model as it was when training began, which DPO and GRPO compare with.

    Under a fresh adapter that is the base model, and costs no memory: the adapter is switched off.
    Of an adapter that training goes on from, a copy is kept.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = None if _is_fresh(model) else WeightCopy(model)

    @property
    def is_base(self) -> bool:
        """Whether it is the base model."""
        return self._start is None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The model is its own reference inside, without gradient and dropout."""
        inside = self._model.disable_adapter() if self._start is None else self._start.acting()
        with evaluating(self._model), inside:
            yield


def _is_fresh(model: nn.Module) -> bool:
    """Whether the adapter changes nothing: of each pair of factors, one is zero.

    That is B of linear layers, and A of embeddings, as peft initialises them.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    zero = [not p.any() for name, p in trained if "lora_B" in name or "lora_embedding_A" in name]
    return bool(zero) and all(zero) and all("lora_" in name for name, _ in trained)
