"""The fused losses against float64 definitions, trl, and numerical gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.experimental.sdft.loss_utils import (
    compute_full_logit_self_distillation_loss,
    compute_topk_self_distillation_loss,
)

from openweights.jobs.unsloth.divergence import (
    Divergence,
    divergence_from_logits,
    linear_divergence,
    logits_divergence,
)
from openweights.models.forward import Head
from tests.rounding import assert_equal_in_float64, assert_sums_equal

KINDS: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jsd")
TRL_ALPHA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def random_problem(
    tokens: int,
    vocabulary: int,
    *,
    hidden: int = 8,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Head, Tensor]:
    student = (torch.randn(tokens, hidden, dtype=dtype) * scale).requires_grad_()
    teacher = torch.randn(tokens, hidden, dtype=dtype) * scale
    head = Head(torch.randn(vocabulary, hidden, dtype=dtype), torch.randn(vocabulary, dtype=dtype))
    return student, teacher, head, torch.rand(tokens, dtype=dtype)


def plain(p: Tensor, q: Tensor, kind: Divergence) -> Tensor:
    """The definitions, written out over probabilities."""
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    return {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    chunk=st.integers(1, 10),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 2**32),
)
def test_fused_equals_the_definition(
    kind: Divergence,
    tokens: int,
    vocabulary: int,
    chunk: int,
    softcap: float | None,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    student, teacher, head, weights = random_problem(tokens, vocabulary, scale=1.0)
    head = Head(head.weight, head.bias, scale, softcap)
    fused = linear_divergence(student, teacher, head, weights, kind, chunk_tokens=chunk)
    (fused.loss * 3).backward()

    reference = student.detach().clone().requires_grad_()
    student_logits = F.linear(reference, head.weight, head.bias) * scale
    teacher_logits = F.linear(teacher, head.weight, head.bias) * scale
    if softcap:
        student_logits, teacher_logits = (
            softcap * (x / softcap).tanh() for x in (student_logits, teacher_logits)
        )
    per_token = plain(student_logits.softmax(-1), teacher_logits.softmax(-1), kind)
    (3 * weights * per_token).sum().backward()

    # Of what is summed: a divergence is what is left of log-probabilities of that size.
    size = float(student_logits.detach().abs().max() + teacher_logits.abs().max() + 1)
    assert_equal_in_float64(fused.per_token, per_token, size=size)
    assert_equal_in_float64(student.grad, reference.grad, size=size * scale)
    p = student_logits.softmax(-1).detach()
    assert_equal_in_float64(fused.entropy, -(p * p.log()).sum(-1), size=size)
    same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    assert torch.equal(fused.agreement, same.double())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_trl_on_the_same_logits(kind: Divergence) -> None:
    student, teacher, head, weights = random_problem(64, 5_000, dtype=torch.float32)
    ours = linear_divergence(student, teacher, head, weights, kind)
    theirs = compute_full_logit_self_distillation_loss(
        head.logits(student), head.logits(teacher), distillation_alpha=TRL_ALPHA[kind]
    )
    terms = 8 + 5_000
    assert_sums_equal(ours.per_token, theirs, terms)
    assert_sums_equal(ours.loss, (weights * theirs).sum(), terms + 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_gradcheck(kind: Divergence, softcap: float | None) -> None:
    student, teacher, head, weights = random_problem(5, 11, scale=1.0)
    head = Head(head.weight, head.bias, 0.5, softcap)
    torch.autograd.gradcheck(
        lambda hidden: linear_divergence(hidden, teacher, head, weights, kind, chunk_tokens=2).loss,
        (student,),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unfused_path_agrees(kind: Divergence) -> None:
    student, teacher, head, weights = random_problem(7, 30)
    fused = linear_divergence(student, teacher, head, weights, kind)
    logits = head.logits(student.detach()).requires_grad_()
    unfused = logits_divergence(logits, head.logits(teacher), weights, kind)
    assert_equal_in_float64(list(fused), list(unfused))
    torch.autograd.gradcheck(
        lambda x: divergence_from_logits(x, head.logits(teacher), kind), (logits,)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_with_the_rest(kind: Divergence) -> None:
    """Against trl's on the same support, by gradcheck, and the whole vocabulary as its limit."""
    student, teacher, head, weights = random_problem(6, 30, scale=0.5)
    options: dict[str, Any] = {"chunk_tokens": 4, "top_k": 7}
    ours = linear_divergence(student, teacher, head, weights, kind, **options)
    theirs = compute_topk_self_distillation_loss(
        head.logits(student),
        head.logits(teacher),
        distillation_topk=7,
        distillation_alpha=TRL_ALPHA[kind],
        distillation_add_tail=True,
    )
    assert_equal_in_float64(ours.per_token, theirs)
    torch.autograd.gradcheck(
        lambda hidden: linear_divergence(hidden, teacher, head, weights, kind, **options).loss,
        (student,),
    )
    whole = linear_divergence(student, teacher, head, weights, kind)
    every = linear_divergence(student, teacher, head, weights, kind, top_k=30)
    assert_equal_in_float64(every.per_token, whole.per_token)
    assert (ours.per_token <= whole.per_token + 1e-12).all(), "merging words hides differences"
    logits = head.logits(student.detach())
    unfused = logits_divergence(logits, head.logits(teacher), weights, kind, top_k=7)
    assert_equal_in_float64(unfused.per_token, ours.per_token)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_opposite_distributions_stay_finite(kind: Divergence) -> None:
    head = Head(torch.eye(4))
    student = (torch.eye(4)[:2] * 200).requires_grad_()
    teacher = torch.eye(4)[2:] * 200
    output = linear_divergence(student, teacher, head, torch.ones(2), kind)
    output.loss.backward()
    assert output.per_token.isfinite().all() and student.grad.isfinite().all()
    expected = math.log(2) if kind == "jsd" else 200.0
    assert_sums_equal(output.per_token, torch.full((2,), expected), 4 + 4, size=200.0)


def test_no_gradient_is_built_for_a_frozen_head_or_the_teacher() -> None:
    student, teacher, head, weights = random_problem(6, 20)
    teacher.requires_grad_()
    linear_divergence(student, teacher, head, weights, "reverse_kl").loss.backward()
    assert student.grad is not None and teacher.grad is None and head.weight.grad is None


def test_no_more_than_a_chunk_of_logits_is_alive() -> None:
    """Counts every tensor that the operators make: none is as large as all logits."""
    tokens, vocabulary, chunk = 64, 1_000, 8
    student, teacher, head, weights = random_problem(tokens, vocabulary, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        linear_divergence(
            student, teacher, head, weights, "jsd", chunk_tokens=chunk
        ).loss.backward()
    assert largest <= chunk * vocabulary
    with Watch():
        linear_divergence(student, teacher, head, weights, "jsd", chunk_tokens=tokens)
    assert largest == tokens * vocabulary, "the watch sees full logits when there are some"


def test_shapes_that_do_not_match_are_refused() -> None:
    student, teacher, head, weights = random_problem(6, 20)
    with pytest.raises(ValueError, match="must be"):
        linear_divergence(student, teacher[:5], head, weights, "reverse_kl")
