"""Log-probabilities of tokens and their gradient from logits, in Triton; imported on CUDA only.

`log_probs.py` defines what is computed. One program takes one token. A first pass over the
vocabulary gathers the normaliser with a running softmax (Milakov and Gimelshein, arXiv 1805.02867):
beside the greatest logit so far, `peak`, it keeps sum(exp(z - peak)), which is scaled down whenever
a greater logit comes. A second pass writes the gradient. Logits are read as they are, and summed in
float32.
"""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def capped(ptr, columns, mask, scale, softcap, HAS_CAP: tl.constexpr):
    """Logits in float32 after the architecture's factor and soft cap; -inf outside `mask`."""
    logits = tl.load(ptr + columns, mask=mask, other=-float("inf")).to(tl.float32) * scale
    if HAS_CAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(mask, logits, -float("inf"))
    return logits


@triton.jit
def _log_prob_kernel(
    logits_ptr, targets_ptr, grad_ptr, log_prob_ptr, entropy_ptr, is_top_ptr,
    size, scale, softcap,
    HAS_CAP: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * size
    target = tl.load(targets_ptr + row)
    peak, total, weighted, top = -float("inf"), 0.0, 0.0, 0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < size
        z = capped(logits, columns, mask, scale, softcap, HAS_CAP)
        high = tl.max(z, axis=0)
        if high > peak:
            top = start + tl.argmax(z, axis=0)
        new_peak = tl.maximum(peak, high)
        shrink = tl.exp(peak - new_peak)
        p = tl.exp(z - new_peak)
        total = total * shrink + tl.sum(p, axis=0)
        weighted = weighted * shrink + tl.sum(p * tl.where(mask, z, 0.0), axis=0)
        peak = new_peak
    log_total = peak + tl.log(total)
    own = tl.sum(capped(logits, target + tl.arange(0, 1), target < size, scale, softcap, HAS_CAP))
    tl.store(log_prob_ptr + row, own - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(is_top_ptr + row, (top == target).to(tl.float32))
    if HAS_GRAD:
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < size
            z = capped(logits, columns, mask, scale, softcap, HAS_CAP)
            grad = tl.where(columns == target, 1.0, 0.0) - tl.exp(z - log_total)
            if HAS_CAP:
                grad = grad * (1 - (z / softcap) * (z / softcap))
            place = grad_ptr + row * size + columns
            tl.store(place, (grad * scale).to(grad_ptr.dtype.element_ty), mask=mask)


def log_prob_kernel(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    stats: tuple[Tensor, ...],
    scale: float,
    softcap: float | None,
) -> None:
    """Fill `stats` and `grad` from raw logits (before scale and soft cap).

    Args:
        logits: Contiguous, shape (N, V).
        targets: Whose log-probability is wanted, shape (N,).
        grad: Receives the gradient of the log-probability in the raw logits, shape (N, V). None for
            no gradient.
        stats: Receive log-probability, entropy, and 1 where the target is the likeliest token;
            float32, shape (N,).
    """
    rows, size = logits.shape
    with torch.cuda.device(logits.device):
        _log_prob_kernel[(rows,)](
            logits, targets, logits if grad is None else grad, *stats,
            size, scale, 1.0 if softcap is None else softcap,
            HAS_CAP=softcap is not None, HAS_GRAD=grad is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(size)), num_warps=16,
        )  # fmt: skip
