"""How far apart two float32 computations of the same mathematics may lie.

In which order a sum is taken is for the processor and its libraries to choose: the width of a
vector, fused multiplications, threads, blocks of a cache. Whatever the order, a float32 sum of n
terms is within γₙ Σ|terms| of the exact one, where γₙ = n u / (1 − n u) and u = 2⁻²⁴ (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1 and 4.2). A comparison of float32
results therefore names how many terms went into them; what is computed in float64 is compared with
`assert_equal_in_float64`. Nothing else in the tests compares tensors within a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

UNIT = 2.0**-24


def rounding(terms: int) -> float:
    """γ of a float32 sum: its largest relative error, in the unit of the sum of magnitudes."""
    assert 0 < terms < 2**20, "with more terms the bound says nothing"
    return terms * UNIT / (1 - terms * UNIT)


def terms_of(model: nn.Module, tokens: int, *, steps: int = 1) -> int:
    """The terms that go into one number of a forward and backward pass, one after the other.

    Every linear layer is a sum over its inputs on the way there, and over its outputs on the way
    back; the head's outputs are also the terms of the softmax. Each attention sums twice over the
    tokens there, and twice back; a gradient sums over all tokens.

    Args:
        tokens: Length of a row, or of all rows together where their gradients are added.
        steps: Steps of gradient descent whose differences add up.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = model.config.num_hidden_layers
    passes = sum(layer.in_features + layer.out_features for layer in linear)
    return steps * (passes + 4 * tokens * layers + tokens)


def assert_sums_equal(
    found: Any, expected: Any, terms: int, *, size: float | None = None, about: str = ""
) -> None:
    """Both are the same sums of `terms` float32 numbers, taken in any order.

    Args:
        found, expected: Tensors, numbers, or mappings and sequences of them.
        size: What the terms' magnitudes add up to. Unless given, it is the largest magnitude of
            each expected tensor (or list of numbers): an entry that is small because its terms
            cancel has the error of its neighbours.
    """
    for one, other in _pairs(found, expected):
        bound = rounding(terms) * (_largest(other) if size is None else size)
        error = _largest(one - other)
        assert error <= bound, f"{about} differs by {error:.2e}, rounding by {bound:.2e} at most"


def assert_equal_in_float64(found: Any, expected: Any, *, size: float | None = None) -> None:
    """Both are the same to nine digits, of the largest magnitude: far above float64's rounding."""
    for one, other in _pairs(found, expected):
        magnitude = _largest(other) if size is None else size
        error = _largest(one - other)
        assert error <= 1e-9 * magnitude, f"differs by {error:.2e} of {magnitude:.2e}"


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _pairs(found: Any, expected: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of both, in float64; a list of numbers is one tensor."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys() and expected, "other names"
        return [pair for name in expected for pair in _pairs(found[name], expected[name])]
    if isinstance(expected, Sequence) and not all(isinstance(e, int | float) for e in expected):
        assert len(found) == len(expected)
        return [pair for two in zip(found, expected, strict=True) for pair in _pairs(*two)]
    pair = [torch.as_tensor(value).detach().double() for value in (found, expected)]
    assert pair[0].shape == pair[1].shape, (pair[0].shape, pair[1].shape)
    return [(pair[0], pair[1])]
