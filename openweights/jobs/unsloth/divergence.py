"""Divergences of a student from a teacher over next tokens, without holding all logits.

With p the student's and q the teacher's distribution over the vocabulary, m = (p + q)/2, z the
student's logits, and the teacher detached:

    reverse_kl  L = KL(p || q)                        dL/dz = p * (log p - log q - L)
    forward_kl  L = KL(q || p)                        dL/dz = p - q
    jsd         L = KL(p || m)/2 + KL(q || m)/2       dL/dz = p * (log p - log m - KL(p || m)) / 2

Self-distillation (arXiv 2601.19897) writes reverse KL in its equations 1-2 and used forward KL for
its results.

`linear_divergence` takes hidden states instead of logits. It projects them chunk by chunk, and
computes the gradient of the hidden states in the same pass: at most one chunk of logits is alive,
and the frozen head gets no gradient. This is where we differ from the usual fused losses, which sum
to a scalar and always build the head's gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from openweights.models.forward import Head, row_groups

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]

CHUNK_TOKENS = 1024
CUDA_CHUNK_TOKENS = 512


class DivergenceOutput(NamedTuple):
    """What a scoring pass says of N tokens; only `loss` carries a gradient.

    Attributes:
        loss: Sum over tokens of weight times divergence, a scalar.
        per_token: Divergence of each token in nats, shape (N,).
        entropy: Entropy of the student in nats, shape (N,).
        agreement: 1 where student and teacher have the same most likely token, else 0; shape (N,).
    """

    loss: Tensor
    per_token: Tensor
    entropy: Tensor
    agreement: Tensor


def divergence_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, kind: Divergence, top_k: int | None = None
) -> Tensor:
    """Divergence per token, shape (N,), differentiable in the student's logits of shape (N, V).

    The readable definition; it keeps several (N, V) tensors for the backward pass.

    Args:
        top_k: Compare on the student's so many most likely words and, as one more, all the rest
            together. None for the whole vocabulary.
    """
    log_p = student_logits.log_softmax(-1)
    log_q = teacher_logits.detach().log_softmax(-1)
    if top_k is not None and top_k < student_logits.shape[-1]:
        words = student_logits.topk(top_k).indices
        log_p, log_q = (_with_rest(x.gather(-1, words)) for x in (log_p, log_q))
    match kind:
        case "reverse_kl":
            return _kl(log_p, log_q)
        case "forward_kl":
            return _kl(log_q, log_p)
        case "jsd":
            log_m = _log_mean(log_p, log_q)
            return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    weights: Tensor,
    kind: Divergence,
    *,
    chunk_tokens: int | None = None,
    top_k: int | None = None,
) -> DivergenceOutput:
    """Weighted divergence of N tokens through a shared frozen head.

    Args:
        student_hidden: Last hidden states of the student, shape (N, H); the only input that gets a
            gradient.
        teacher_hidden: Last hidden states of the teacher on the same tokens, shape (N, H).
        head: The output head that both share.
        weights: Weight of each token in the loss, shape (N,).
        kind: Which divergence.
        chunk_tokens: Tokens whose logits are alive at a time; None for 512 on CUDA (half a GiB of
            them for 128k words, at full speed) and 1024 elsewhere.
        top_k: See `divergence_from_logits`; without the kernel, so slower on CUDA.

    Raises:
        ValueError: Shapes do not match.
    """
    if student_hidden.shape != teacher_hidden.shape or weights.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"student {tuple(student_hidden.shape)}, teacher {tuple(teacher_hidden.shape)} and "
            f"weights {tuple(weights.shape)} must be (N, H), (N, H) and (N,)"
        )
    if chunk_tokens is None:
        chunk_tokens = CUDA_CHUNK_TOKENS if student_hidden.is_cuda else CHUNK_TOKENS
    return DivergenceOutput(
        *_LinearDivergence.apply(
            student_hidden, teacher_hidden, head, weights, kind, chunk_tokens, top_k
        )
    )


def logits_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    kind: Divergence,
    top_k: int | None = None,
) -> DivergenceOutput:
    """`linear_divergence` for heads that are trained, too: from logits (N, V), by autograd."""
    per_token = divergence_from_logits(student_logits, teacher_logits, kind, top_k)
    with torch.no_grad():
        log_p = student_logits.log_softmax(-1)
        entropy = _entropy(log_p)
        agreement = _agreement(student_logits, teacher_logits)
    return DivergenceOutput((weights * per_token).sum(), per_token.detach(), entropy, agreement)


class _LinearDivergence(torch.autograd.Function):
    """Computes the hidden states' gradient while the chunk's logits are there.

    Backward only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        head: Head,
        weights: Tensor,
        kind: Divergence,
        chunk_tokens: int,
        top_k: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        count = student_hidden.shape[0]
        stats = torch.empty(3, count, dtype=dtype, device=student_hidden.device)
        grad = torch.empty_like(student_hidden) if ctx.needs_input_grad[0] else None
        use_kernel = student_hidden.is_cuda and student_hidden.dtype != torch.float64
        score = _score_fused if use_kernel and top_k is None else partial(_score, top_k=top_k)
        for start in range(0, count, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            score(
                student_hidden[rows],
                teacher_hidden[rows],
                head,
                weights[rows],
                kind,
                stats[:, rows],
                None if grad is None else grad[rows],
            )
        ctx.save_for_backward(grad)
        per_token, entropy, agreement = stats
        ctx.mark_non_differentiable(per_token, entropy, agreement)
        return (weights * per_token).sum(), per_token, entropy, agreement

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        loss_grad = grad_outputs[0]
        scaled = None if grad is None else grad * loss_grad.to(grad.dtype)
        return scaled, None, None, None, None, None, None


def _score(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    weights: Tensor,
    kind: Divergence,
    stats: Tensor,
    grad: Tensor | None,
    *,
    top_k: int | None = None,
) -> None:
    """Fill in a chunk's divergence, entropy, agreement (3, N), and the hidden states' gradient."""
    student, teacher = head.logits(student_hidden), head.logits(teacher_hidden)
    raw_grad = None
    if grad is not None:
        raw_grad = torch.empty_like(student, dtype=head.grad_dtype(student.dtype))
    for rows in row_groups(student):
        logits, scored = student[rows], stats[:, rows]
        logits_grad = _score_rows(logits, teacher[rows], kind, scored, top_k)
        if raw_grad is not None:
            raw_grad[rows] = head.raw_grad(logits, logits_grad.mul_(weights[rows, None]))
    if grad is not None and raw_grad is not None:
        grad.copy_(head.grad_through(raw_grad))


def _score_rows(
    student: Tensor, teacher: Tensor, kind: Divergence, stats: Tensor, top_k: int | None
) -> Tensor:
    """Fill in the three of these logits; their divergence's gradient in the student's."""
    stats[2] = _agreement(student, teacher)
    log_p = student.log_softmax(-1)
    stats[1] = _entropy(log_p)
    if top_k is None:
        stats[0], grad = _divergence_and_grad(log_p, teacher.log_softmax(-1), kind)
    else:
        stats[0], grad = _top_k_divergence_and_grad(student, teacher, kind, top_k)
    return grad


def _score_fused(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    weights: Tensor,
    kind: Divergence,
    stats: Tensor,
    grad: Tensor | None,
) -> None:
    """`_score` on CUDA: logits in float32, two passes over them, gradient in the head's type."""
    from openweights.jobs.unsloth.kernels.divergence import divergence_kernel

    student, teacher = head.raw_logits(student_hidden), head.raw_logits(teacher_hidden)
    logits_grad = None if grad is None else torch.empty_like(student, dtype=head.weight.dtype)
    divergence_kernel(
        student, teacher, weights, logits_grad, stats.unbind(), kind, head.scale, head.softcap
    )
    if grad is not None and logits_grad is not None:
        grad.copy_(logits_grad @ head.weight)


def _divergence_and_grad(log_p: Tensor, log_q: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence per token, shape (N,), and its gradient in the student's logits, shape (N, V)."""
    p = log_p.exp()
    match kind:
        case "reverse_kl":
            log_ratio = log_p - log_q
            divergence = (p * log_ratio).sum(-1)
            return divergence, p.mul_(log_ratio.sub_(divergence[:, None]))
        case "forward_kl":
            return _kl(log_q, log_p), p.sub_(log_q.exp())
        case "jsd":
            log_m = _log_mean(log_p, log_q)
            log_ratio = log_p - log_m
            kl_p = (p * log_ratio).sum(-1)
            grad = p.mul_(log_ratio.sub_(kl_p[:, None])).mul_(0.5)
            return (kl_p + _kl(log_q, log_m)) / 2, grad


def _top_k_divergence_and_grad(
    student: Tensor, teacher: Tensor, kind: Divergence, top_k: int
) -> tuple[Tensor, Tensor]:
    """As `_divergence_and_grad`, by autograd."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        divergence = divergence_from_logits(leaf, teacher, kind, top_k)
        (grad,) = torch.autograd.grad(divergence.sum(), leaf)
    return divergence.detach(), grad


def _with_rest(log_p: Tensor) -> Tensor:
    """Appends the log-probability of everything that is not listed."""
    # Rounding may bring the sum to 1, whose rest would have no logarithm.
    listed = log_p.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(listed))], dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row. A probability that underflows to 0 contributes 0, not NaN."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log((a + b) / 2)."""
    return torch.logaddexp(log_a, log_b) - torch.log(torch.tensor(2.0, dtype=log_a.dtype))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(student_logits.dtype)
