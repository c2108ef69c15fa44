"""The Triton divergences against float64, on fresh random inputs with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from openweights.jobs.unsloth.divergence import Divergence, linear_divergence
from openweights.models.forward import Head

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "softcap", "scale"),
    [(1, 100, None, 1.0), (37, 5_001, 8.0, 0.5), (700, 50_257, None, 1.0)],
)
def test_kernel_equals_float64(
    kind: Divergence,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int,
    vocabulary: int,
    softcap: float | None,
    scale: float,
) -> None:
    random = {"device": "cuda", "dtype": dtype}
    student = torch.randn(tokens, 64, **random).requires_grad_()
    teacher = student.detach() + torch.randn(tokens, 64, **random) * 0.3
    weight, bias = torch.randn(vocabulary, 64, **random) * 0.3, torch.randn(vocabulary, **random)
    weights = torch.rand(tokens, device="cuda")
    # What the allocator hands out next holds NaN: outputs that are not written show.
    torch.full((tokens * vocabulary,), float("nan"), device="cuda")
    fast = linear_divergence(student, teacher, Head(weight, bias, scale, softcap), weights, kind)
    fast.loss.backward()

    exact = student.detach().double().requires_grad_()
    head = Head(weight.double(), bias.double(), scale, softcap)
    slow = linear_divergence(exact, teacher.double(), head, weights.double(), kind)
    slow.loss.backward()
    for name in ("per_token", "entropy"):
        error = (getattr(fast, name) - getattr(slow, name)).norm() / getattr(slow, name).norm()
        assert error <= tolerance / 5, name
    assert (fast.agreement == slow.agreement).float().mean() >= 0.99
    assert (student.grad - exact.grad).norm() <= tolerance * exact.grad.norm()
    # A divergence sums differences of log-probabilities, and its error is relative to their size:
    # where student and teacher are near each other it is much smaller than they are.
    size = (weights * slow.entropy).sum() + slow.loss
    assert abs(fast.loss - slow.loss) <= tolerance / 10 * size


def test_no_more_than_a_gibibyte_above_the_inputs() -> None:
    student = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn_like(student)
    head = Head(torch.randn(128_256, 512, device="cuda", dtype=torch.bfloat16) * 0.05)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.ones(4096, device="cuda")
    linear_divergence(student, teacher, head, weights, "reverse_kl").loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
