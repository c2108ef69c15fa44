"""Logits to tokens: the one way in which every engine draws, and tells log-probabilities.

A draw is an exponential race: argmax of p / e with e ~ Exp(1) independent for each token of the
vocabulary is a sample of p. The noise e is a function of (key, position, token id) alone, where the
key of a row is made of seed, prompt and sample index; so a row draws the same whatever rows are
beside it, on every device and in every engine, and tiny differences of logits change few draws.
Nothing here waits for the device, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openweights.generation.params import GenerationRequest, SamplingParams

# Quotients of logits must be numbers of float32: below the one a row takes the likeliest token,
# above the other all tokens are equally likely.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-5, 1e6
LARGEST_UNIFORM = 1 - 2.0**-24  # the largest below 1 in float32


def row_key(request: GenerationRequest, sample: int) -> tuple[int, int]:
    """Two 32-bit words (signed) that stand for seed, prompt and sample index."""
    words = [request.params.seed, sample, *request.prompt_ids]
    digest = hashlib.blake2b(b"".join(w.to_bytes(8, "little") for w in words), digest_size=8)
    first, second = struct.unpack("<ii", digest.digest())
    return first, second


@dataclass(slots=True)
class Rows:
    """What the draws of some rows need, as tensors on the device of the logits.

    Attributes:
        keys: Shape (B, 2), int32 (`row_key`).
        temperature: Shape (B,); 0 for greedy rows.
        top_k: Shape (B,); the size of the vocabulary for all.
        top_p, min_p, presence, frequency: Shape (B,), as of `SamplingParams`.
        scored_temperature: Shape (B,); log-probabilities are of the logits divided by this.
        ends: Shape (B, E), what ends a row, filled up with repetitions.
        first_end: Shape (B,); no end is drawn before this position.
        draws: Whether any row is not greedy.
        widest: Nothing to sort (0), or so many likeliest tokens hold what top_k and top_p need.
        limits: Whether any row has a top_k, top_p or min_p.
        penalizes: Whether any row has a penalty.
        delays: Whether any row has a `first_end`.
    """

    keys: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    presence: Tensor
    frequency: Tensor
    scored_temperature: Tensor
    ends: Tensor
    first_end: Tensor
    draws: bool
    widest: int
    limits: bool
    penalizes: bool
    delays: bool

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        keys: Sequence[tuple[int, int]],
        ends: Sequence[Collection[int]],
        vocabulary: int,
        device: torch.device | str,
    ) -> Rows:
        """Rows with these parameters, keys and end tokens.

        Ends beyond the vocabulary, as a tokenizer with more tokens than its model has them, are
        never drawn.
        """
        ends = [[end for end in own if end < vocabulary] for own in ends]
        delays = [p.min_new_tokens if own else 0 for p, own in zip(params, ends, strict=True)]
        width = max(map(len, ends), default=0)
        filled = [[*own, *(own[:1] or [0]) * (width - len(own))] for own in ends]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            keys=torch.tensor(keys, dtype=torch.int32, device=device),
            temperature=column([_temperature(p) for p in params]),
            top_k=torch.tensor([_top_k(p, vocabulary) for p in params], device=device),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            presence=column([p.presence_penalty for p in params]),
            frequency=column([p.frequency_penalty for p in params]),
            scored_temperature=column([_scored_temperature(p) for p in params]),
            ends=torch.tensor(filled, dtype=torch.long, device=device).view(len(params), width),
            first_end=torch.tensor(delays, dtype=torch.long, device=device),
            draws=any(_temperature(p) > 0 for p in params),
            widest=max((_width(p, vocabulary) for p in params), default=0),
            limits=any(_width(p, vocabulary) or p.min_p for p in params),
            penalizes=any(p.has_penalties for p in params),
            delays=any(delays),
        )

    def __len__(self) -> int:
        return len(self.keys)


def _top_k(params: SamplingParams, vocabulary: int) -> int:
    return min(params.top_k or vocabulary, vocabulary)


def _temperature(params: SamplingParams) -> float:
    given = params.temperature
    return min(given, HIGHEST_TEMPERATURE) if given >= LOWEST_TEMPERATURE else 0.0


def _scored_temperature(params: SamplingParams) -> float:
    return (_temperature(params) or 1.0) if params.logprobs_after_temperature else 1.0


def _width(params: SamplingParams, vocabulary: int) -> int:
    """How many of the likeliest tokens must be sorted to know which of them stay."""
    top_k = _top_k(params, vocabulary)
    limited = _temperature(params) > 0 and (params.top_p < 1 or top_k < vocabulary)
    return top_k if limited else 0


def select(logits: Tensor, rows: Rows, positions: Tensor, counts: Tensor | None = None) -> Tensor:
    """One token a row, shape (B,).

    Args:
        logits: Shape (B, V).
        positions: Index of the token within its completion, from 0; shape (B,).
        counts: How often each completion has each token, shape (B, V); for rows with penalties.
    """
    if rows.penalizes and counts is not None:
        logits = _penalized(logits, counts, rows)
    if rows.delays:
        logits = _without_ends(logits, rows, positions)
    greedy = logits.argmax(-1)
    if not rows.draws:
        return greedy
    is_drawn = rows.temperature > 0
    scaled = at_least_float(logits) / torch.where(is_drawn, rows.temperature, 1)[:, None]
    if rows.limits:
        scaled = scaled.masked_fill(scaled < _threshold(scaled, rows)[:, None], -torch.inf)
    race = scaled - exponential_noise(rows.keys, positions, logits.shape[-1]).log()
    return torch.where(is_drawn, race.argmax(-1), greedy)


def _penalized(logits: Tensor, counts: Tensor, rows: Rows) -> Tensor:
    values = at_least_float(logits) - rows.presence[:, None] * (counts > 0)
    return values - rows.frequency[:, None] * counts


def _without_ends(logits: Tensor, rows: Rows, positions: Tensor) -> Tensor:
    """Logits with nothing that ends rows which are still too short."""
    values = logits.gather(-1, rows.ends)
    too_short = (positions < rows.first_end)[:, None]
    return logits.scatter(-1, rows.ends, values.masked_fill(too_short, -torch.inf))


def _threshold(scaled: Tensor, rows: Rows) -> Tensor:
    """The logit that a token needs to stay, shape (B,); equal ones stay together."""
    likeliest = scaled.amax(-1)
    threshold = likeliest + rows.min_p.to(scaled.dtype).log()  # -inf without min_p
    if not rows.widest:
        return threshold
    best = scaled.topk(rows.widest, -1).values  # (B, K), falling
    places = torch.arange(rows.widest, device=scaled.device)
    best = best.masked_fill(places >= rows.top_k[:, None], -torch.inf)
    shares = best.softmax(-1)
    stays = (shares.cumsum(-1) - shares < rows.top_p[:, None]) & (places < rows.top_k[:, None])
    last = torch.where(stays, best, torch.inf).amin(-1)
    unlimited = (rows.top_p >= 1) & (rows.top_k >= scaled.shape[-1])
    return torch.maximum(threshold, last.masked_fill(unlimited, -torch.inf))


def log_probs(logits: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
    """Log-probability of each row's token, shape (B,), before penalties and limits."""
    scores = at_least_float(logits) / rows.scored_temperature[:, None]
    return scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1)


def top_log_probs(logits: Tensor, count: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of each row's likeliest tokens, both of shape (B, count), or of all
    tokens where there are fewer; of those equally likely the ones with lower ids, in their order.
    """
    scores = at_least_float(logits) / rows.scored_temperature[:, None]
    ids = _ranks(scores).topk(min(count, scores.shape[-1]), -1).indices
    return scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True), ids


def _ranks(scores: Tensor) -> Tensor:
    """Integers in the order of the scores, all different in a row: which of equal ones `topk` takes
    depends on how many it is asked for, and so on what others in the batch ask for.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 is 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    return ordered * 2**31 - torch.arange(scores.shape[-1], device=scores.device)


def at_least_float(values: Tensor) -> Tensor:
    """In float32, or more where it has more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def exponential_noise(keys: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Exp(1) noise of shape (B, V) in float32: a function of key, position and token id.

    A counter-based generator: the 32-bit integer hash "lowbias32" (C. Wellons, "Prospecting for
    Hash Functions", 2018) of the token id, started and stirred with two words of the row.
    """
    first = _hashed(keys[:, 0] ^ _hashed(keys[:, 1] + positions.to(torch.int32)))
    second = _hashed(first ^ keys[:, 1])
    ids = torch.arange(vocabulary, dtype=torch.int32, device=keys.device) * _GOLDEN
    values = first[:, None] ^ ids  # (B, V)
    values ^= (values >> 16) & 0xFFFF
    values *= _FACTOR_1
    values ^= second[:, None]
    values ^= (values >> 15) & 0x1FFFF
    values *= _FACTOR_2
    values ^= (values >> 16) & 0xFFFF
    uniform = (values & 0x7FFFFFFF).to(torch.float32).mul_(2.0**-31).add_(2.0**-32)
    return uniform.clamp_(max=LARGEST_UNIFORM).neg_().log1p_().neg_()


_GOLDEN, _FACTOR_1, _FACTOR_2 = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def _hashed(values: Tensor) -> Tensor:
    """lowbias32 of int32 values, whose shifts are made logical by masks."""
    values = values ^ ((values >> 16) & 0xFFFF)
    values = values * _FACTOR_1
    values = values ^ ((values >> 15) & 0x1FFFF)
    values = values * _FACTOR_2
    return values ^ ((values >> 16) & 0xFFFF)
