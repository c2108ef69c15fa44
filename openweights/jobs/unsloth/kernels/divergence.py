"""Divergence and its gradient from two rows of logits, in Triton; imported on CUDA only.

`divergence.py` defines what is computed. One program takes one token: a first pass over the
vocabulary gathers both normalisers and the expectations with a running softmax, a last one writes
the gradient. Logits are read in the precision they come in and everything is summed in float32.
"""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openweights.models.log_prob_kernel import capped

BLOCK = 4096
KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}


@triton.jit
def _log_mean(log_p, log_q):
    high, low = tl.maximum(log_p, log_q), tl.minimum(log_p, log_q)
    return high + tl.log(1 + tl.exp(low - high)) - 0.6931471805599453


@triton.jit
def _divergence_kernel(  # noqa: C901, PLR0915 - one kernel, which cannot be cut
    student_ptr, teacher_ptr, weights_ptr, grad_ptr, per_token_ptr, entropy_ptr, agreement_ptr,
    size, scale, softcap,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student, teacher = student_ptr + row * size, teacher_ptr + row * size
    max_s, max_t = -float("inf"), -float("inf")
    arg_s, arg_t = 0, 0
    sum_s, sum_t, mean_s, gap_s, gap_t = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < size
        s = capped(student, columns, mask, scale, softcap, HAS_CAP)
        t = capped(teacher, columns, mask, scale, softcap, HAS_CAP)
        high_s, high_t = tl.max(s, axis=0), tl.max(t, axis=0)
        if high_s > max_s:
            arg_s = start + tl.argmax(s, axis=0)
        if high_t > max_t:
            arg_t = start + tl.argmax(t, axis=0)
        new_s, new_t = tl.maximum(max_s, high_s), tl.maximum(max_t, high_t)
        shrink_s, shrink_t = tl.exp(max_s - new_s), tl.exp(max_t - new_t)
        p, q = tl.exp(s - new_s), tl.exp(t - new_t)
        gap = tl.where(mask, s - t, 0.0)
        sum_s = sum_s * shrink_s + tl.sum(p, axis=0)
        sum_t = sum_t * shrink_t + tl.sum(q, axis=0)
        mean_s = mean_s * shrink_s + tl.sum(p * tl.where(mask, s, 0.0), axis=0)
        gap_s = gap_s * shrink_s + tl.sum(p * gap, axis=0)
        gap_t = gap_t * shrink_t - tl.sum(q * gap, axis=0)
        max_s, max_t = new_s, new_t
    lse_s, lse_t = max_s + tl.log(sum_s), max_t + tl.log(sum_t)
    tl.store(entropy_ptr + row, lse_s - mean_s / sum_s)
    tl.store(agreement_ptr + row, (arg_s == arg_t).to(tl.float32))
    kl_p = 0.0
    if KIND == 0:
        kl_p = gap_s / sum_s - lse_s + lse_t
        divergence = kl_p
    elif KIND == 1:
        divergence = gap_t / sum_t - lse_t + lse_s
    else:
        kl_q = 0.0
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < size
            log_p = capped(student, columns, mask, scale, softcap, HAS_CAP) - lse_s
            log_q = capped(teacher, columns, mask, scale, softcap, HAS_CAP) - lse_t
            log_m = _log_mean(log_p, log_q)
            kl_p += tl.sum(tl.where(mask, tl.exp(log_p) * (log_p - log_m), 0.0), axis=0)
            kl_q += tl.sum(tl.where(mask, tl.exp(log_q) * (log_q - log_m), 0.0), axis=0)
        divergence = (kl_p + kl_q) / 2
    tl.store(per_token_ptr + row, divergence)
    if HAS_GRAD:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < size
            s = capped(student, columns, mask, scale, softcap, HAS_CAP)
            log_p = s - lse_s
            log_q = capped(teacher, columns, mask, scale, softcap, HAS_CAP) - lse_t
            p = tl.exp(log_p)
            if KIND == 0:
                grad = p * (log_p - log_q - kl_p)
            elif KIND == 1:
                grad = p - tl.exp(log_q)
            else:
                grad = p * (log_p - _log_mean(log_p, log_q) - kl_p) * 0.5
            if HAS_CAP:
                grad = grad * (1 - (s / softcap) * (s / softcap))
            target = grad_ptr + row * size + columns
            tl.store(target, (grad * weight * scale).to(grad_ptr.dtype.element_ty), mask=mask)


def divergence_kernel(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    grad: Tensor | None,
    stats: tuple[Tensor, ...],
    kind: str,
    scale: float,
    softcap: float | None,
) -> None:
    """Fill `stats` and `grad` from raw logits (before scale and soft cap).

    Args:
        student, teacher: Contiguous logits of shape (N, V).
        weights: Of each token, shape (N,).
        grad: Receives the gradient in the raw student logits, shape (N, V); may be `student`'s own
            memory only in the same precision. None for no gradient.
        stats: Receive divergence, entropy and agreement of each token, float32, shape (N,).
    """
    rows, size = student.shape
    with torch.cuda.device(student.device):
        _divergence_kernel[(rows,)](
            student, teacher, weights, student if grad is None else grad, *stats,
            size, scale, 1.0 if softcap is None else softcap,
            KIND=KINDS[kind], HAS_CAP=softcap is not None, HAS_GRAD=grad is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(size)), num_warps=16,
        )  # fmt: skip
