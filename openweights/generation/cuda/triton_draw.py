"""Drawing tokens from logits as Triton kernels: the same noise, limits and log-probabilities as
`selection` computes in torch.

`triton_ops` says what the abbreviations mean.
"""

# Triton has no types, and is there only where CUDA is.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openweights.generation.selection import Rows


@triton.jit
def _hashed(x):
    """lowbias32, as of `selection`."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _ordered(x, BITS: tl.constexpr):
    """A whole number for each number, in the same order: bits of floating-point numbers rise with
    their magnitude, so those of negative ones are turned round. bfloat16 fills 16 bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _count_and_mass(
    logits_ptr, above, largest, temperature, vocabulary, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many logits of a row are above a number (`_ordered`), and the sum of their
    exp((logit - largest) / temperature)."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=-float("inf"))
        logits = logits.to(tl.float32)
        is_above = (_ordered(logits, BITS) > above) & (ids < vocabulary)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, tl.exp((logits - largest) / temperature), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _threshold_kernel(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, vocabulary,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row: what a logit divided by the temperature must reach to stay in the
    draw. The k-th largest logit, and the least that belongs to the nucleus, are found bit by bit:
    how many are above a number, and their mass, fall as the number rises. That reads the row from
    the cache once a bit, where sorting a vocabulary takes several times as long as that."""
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        block = tl.load(logits + ids, mask=ids < vocabulary, other=-float("inf"))
        highest = tl.maximum(highest, block.to(tl.float32))
    largest = tl.max(highest, axis=0)
    lowest_number = (top_k * 0 - 1) << (BITS - 1)

    number = lowest_number
    if top_k < vocabulary:
        # The largest number of which at least k logits are no smaller: more than k - 1 above the
        # number before it.
        end = -lowest_number
        for _ in range(BITS):
            middle = (number + end) >> 1
            count, mass = _count_and_mass(
                logits, middle - 1, largest, temperature, vocabulary, BITS, BLOCK
            )
            enough = count >= top_k
            number, end = tl.where(enough, middle, number), tl.where(enough, end, middle)
    if top_p < 1:
        # Of what top_k leaves; of logits equal to the k-th only as many as k has room for.
        count, mass = _count_and_mass(logits, number, largest, temperature, vocabulary, BITS, BLOCK)
        total = mass
        if top_k < vocabulary:
            bits = number << (32 - BITS)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
            total += (top_k - count) * tl.exp((value - largest) / temperature)
        # The smallest number above which there is less than the nucleus.
        before, number_p = lowest_number - 1, -lowest_number
        for _ in range(BITS + 1):
            middle = (before + number_p) >> 1
            count, mass = _count_and_mass(
                logits, middle, largest, temperature, vocabulary, BITS, BLOCK
            )
            less = (mass < top_p * total) & (middle > before)
            number_p, before = tl.where(less, middle, number_p), tl.where(less, before, middle)
        number = tl.maximum(number, number_p)
    bits = number << (32 - BITS)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int32).to(tl.float32, bitcast=True)
    is_limited = (top_k < vocabulary) | (top_p < 1)
    threshold = tl.where(is_limited, value / temperature, -float("inf"))
    least = largest / temperature + tl.log(tl.load(min_p_ptr + row))  # -inf without min_p
    tl.store(out_ptr + row, tl.maximum(threshold, least))


@triton.jit
def _draw_kernel(
    logits_ptr, stride, keys_ptr, positions_ptr, temperature_ptr, scored_ptr, threshold_ptr,
    partial_ptr, best_ptr, count, vocabulary, blocks, IS_LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a row and a block of the vocabulary: the best of its race (`selection`), or of
    its logits where the row is greedy, and the largest score and the sum of exp(score - largest),
    of which the log-probability is made."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocabulary
    at = logits_ptr + row.to(tl.int64) * stride + ids
    logits = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)

    key_1 = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
    key_2 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.uint32)
    first = _hashed(key_1 ^ _hashed(key_2 + position))
    second = _hashed(first ^ key_2)
    noise = first ^ (ids.to(tl.uint32) * 0x9E3779B1)
    noise ^= noise >> 16
    noise *= 0x7FEB352D
    noise ^= second
    noise ^= noise >> 15
    noise *= 0x846CA68B
    noise ^= noise >> 16
    uniform = (noise & 0x7FFFFFFF).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.9999999403953552)
    # -log(1 - u), by its series where 1 - u would round u away.
    series = uniform * (1 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.0078125, series, -tl.log(1 - uniform))
    temperature = tl.load(temperature_ptr + row)
    is_drawn = temperature > 0
    scaled = logits / tl.where(is_drawn, temperature, 1.0)
    race = scaled - tl.log(exponential)
    if IS_LIMITED:
        race = tl.where(scaled < tl.load(threshold_ptr + row), -float("inf"), race)
    value = tl.where(inside, tl.where(is_drawn, race, logits), -float("inf"))

    scores = logits / tl.load(scored_ptr + row)
    largest = tl.max(scores, axis=0)
    total = tl.sum(tl.exp(scores - largest), axis=0)
    to = row * blocks + block
    tl.store(partial_ptr + to, tl.max(value, axis=0))
    tl.store(best_ptr + to, block * BLOCK + tl.argmax(value, axis=0))
    tl.store(partial_ptr + count * blocks + to, largest)
    tl.store(partial_ptr + 2 * count * blocks + to, total)


@triton.jit
def _best_kernel(
    logits_ptr, stride, scored_ptr, partial_ptr, best_ptr, tokens_ptr, log_probs_ptr, count, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row: the best of its blocks, and its log-probability."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    inside = block < blocks
    at = row * blocks + block
    values = tl.load(partial_ptr + at, mask=inside, other=-float("inf"))
    token = tl.load(best_ptr + row * blocks + tl.argmax(values, axis=0))
    largest = tl.load(partial_ptr + count * blocks + at, mask=inside, other=-float("inf"))
    totals = tl.load(partial_ptr + 2 * count * blocks + at, mask=inside, other=0.0)
    peak = tl.max(largest, axis=0)
    total = tl.sum(totals * tl.exp(largest - peak), axis=0)
    own = tl.load(logits_ptr + row.to(tl.int64) * stride + token).to(tl.float32)
    score = own / tl.load(scored_ptr + row)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(log_probs_ptr + row, score - peak - tl.log(total))


def draw(logits: Tensor, rows: Rows, positions: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops`."""
    count, vocabulary = logits.shape
    block = 4096
    blocks = triton.cdiv(vocabulary, block)
    partial = torch.empty(3, count, blocks, dtype=torch.float32, device=logits.device)
    best = torch.empty(count, blocks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(count, dtype=torch.long, device=logits.device)
    log_probs = torch.empty(count, dtype=torch.float32, device=logits.device)
    threshold = log_probs
    if rows.limits:
        threshold = torch.empty_like(log_probs)
        _threshold_kernel[(count,)](
            logits, logits.stride(0), rows.temperature, rows.top_k, rows.top_p, rows.min_p,
            threshold, vocabulary, BITS=16 if logits.dtype == torch.bfloat16 else 32, BLOCK=16_384,
            num_warps=32,
        )  # fmt: skip
    _draw_kernel[(count, blocks)](
        logits, logits.stride(0), rows.keys, positions, rows.temperature, rows.scored_temperature,
        threshold, partial, best, count, vocabulary, blocks, IS_LIMITED=rows.limits, BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    _best_kernel[(count,)](
        logits, logits.stride(0), rows.scored_temperature, partial, best, tokens, log_probs, count,
        blocks, BLOCK=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip
    return tokens, log_probs
