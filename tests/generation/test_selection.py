"""Draws have the distribution that their parameters say, and depend on their own row alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.selection import (
    Rows,
    exponential_noise,
    log_probs,
    row_key,
    select,
    top_log_probs,
)
from tests.rounding import assert_sums_equal

VOCABULARY = 40
CRITICAL = {9: 27.88, 15: 37.70, 24: 51.18, 39: 72.05}  # chi-square, p = 0.001; seeds are fixed


def logits() -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 1.5


def rows(count: int, params: SamplingParams, ends: tuple[int, ...] = ()) -> Rows:
    keys = [row_key(GenerationRequest([1, 2], params), sample) for sample in range(count)]
    return Rows.of([params] * count, keys, [ends] * count, VOCABULARY, "cpu")


def kept(probabilities: Tensor, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """The definition, in float64, token by token."""
    order = probabilities.argsort(descending=True).tolist()
    left = order[: top_k or len(order)]
    total = sum(float(probabilities[i]) for i in left)
    nucleus: list[int] = []
    for token in left:
        if sum(float(probabilities[i]) for i in nucleus) / total < top_p:
            nucleus.append(token)
    best = float(probabilities[order[0]])
    stays = [i for i in nucleus if float(probabilities[i]) >= min_p * best]
    result = torch.zeros_like(probabilities)
    result[stays] = probabilities[stays]
    return result / result.sum()


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.0},
        {"top_k": 10},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"top_k": 12, "top_p": 0.95, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_draws_have_the_distribution_that_is_asked_for(limits: dict[str, Any]) -> None:
    """Chi-square against the definition; and the test can tell another temperature."""
    count, params = 20_000, SamplingParams(**limits)
    drawn = select(logits().expand(count, -1), rows(count, params), torch.zeros(count))
    seen = torch.bincount(drawn, minlength=VOCABULARY).double()

    def statistic(temperature: float) -> tuple[float, int]:
        shares = (logits().double() / temperature).softmax(-1)
        expected = kept(shares, params.top_k, params.top_p, params.min_p) * count
        used = expected > 0
        assert float(seen[~used].sum()) == 0 or temperature != params.temperature
        return float((((seen - expected) ** 2)[used] / expected[used]).sum()), int(used.sum()) - 1

    value, freedom = statistic(params.temperature)
    critical = next(CRITICAL[f] for f in sorted(CRITICAL) if f >= freedom)
    assert value < critical
    assert statistic(params.temperature * 1.3)[0] > critical


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    """Other rows have limits, penalties and delayed ends, which this one must not feel."""
    alone = SamplingParams(seed=5)
    others = [
        SamplingParams(seed=1, top_k=3, top_p=0.5),
        SamplingParams(temperature=0),
        SamplingParams(seed=2, min_p=0.5, min_new_tokens=3, presence_penalty=2),
    ]
    key = row_key(GenerationRequest([9], alone), 0)
    single = Rows.of([alone], [key], [(0,)], VOCABULARY, "cpu")
    mixed = Rows.of(
        [*others, alone],
        [row_key(GenerationRequest([9], p), 0) for p in others] + [key],
        [(0,), (1, 2), (4, 5, 6), (0,)],
        VOCABULARY,
        "cpu",
    )
    counts = torch.ones(4, VOCABULARY)
    for position in range(200):
        values = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(position))
        together = select(values, mixed, torch.full((4,), position), counts)
        own = select(values[3:], single, torch.tensor([position]))
        assert together[3] == own[0] and together[1] == values[1].argmax()


def test_draws_of_neighbouring_positions_samples_and_seeds_are_independent() -> None:
    """Chi-square of pairs of draws from a uniform distribution over 5 tokens."""
    flat, count = torch.zeros(5), 20_000
    one = SamplingParams(seed=7)

    def drawn(seed: int, samples: range, position: int, prompt: int = 1) -> Tensor:
        request = GenerationRequest([prompt], SamplingParams(seed=seed))
        keys = [row_key(request, sample) for sample in samples]
        own = Rows.of([one] * count, keys, [()] * count, 5, "cpu")
        return select(flat.expand(count, -1), own, torch.full((count,), position))

    first = drawn(7, range(count), 0)
    for second in (
        drawn(7, range(count), 1),
        drawn(7, range(1, count + 1), 0),
        drawn(8, range(count), 0),
        drawn(7, range(count), 0, prompt=2),
    ):
        seen = torch.bincount(first * 5 + second, minlength=25).double()
        assert float(((seen - count / 25) ** 2 / (count / 25)).sum()) < CRITICAL[24]


def test_noise_is_exponential_to_its_small_end() -> None:
    """Moments, and the share of small values, by which unlikely tokens are drawn."""
    keys = torch.tensor([row_key(GenerationRequest([1]), s) for s in range(50)], dtype=torch.int32)
    noise = exponential_noise(keys, torch.zeros(50), 100_000).double()
    count = noise.numel()
    assert float((noise.mean() - 1).abs()) < 4 / count**0.5
    assert float((noise.var() - 1).abs()) < 4 * 8**0.5 / count**0.5
    for bound in (1e-1, 1e-3, 1e-5):
        expected = count * -torch.expm1(torch.tensor(-bound, dtype=torch.float64))
        assert float(((noise < bound).sum() - expected).abs()) < 4 * float(expected) ** 0.5
    assert float(noise.min()) > 0 and float(noise.max()) < 17


def test_penalties_are_what_they_are_called() -> None:
    values = torch.zeros(3, VOCABULARY)
    values[:, 0], values[:, 1] = 1.0, 0.5
    params = SamplingParams(temperature=0, presence_penalty=0.3, frequency_penalty=0.15)
    counts = torch.zeros(3, VOCABULARY)
    counts[1, 0], counts[2, 0] = 1, 2  # 1 - 0.45 > 0.5, 1 - 0.6 < 0.5
    own = rows(3, params)
    assert select(values, own, torch.zeros(3), counts).tolist() == [0, 0, 1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_whose_quotients_are_no_numbers_is_greedy(temperature: float) -> None:
    values = torch.stack([logits(), logits() - 50, logits() * 1000])
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs_after_temperature=True)
    own = rows(3, params)
    best = values.argmax(-1)
    assert torch.equal(select(values, own, torch.zeros(3)), best)
    assert torch.isfinite(log_probs(values, best, own)).all()


def test_the_highest_temperature_draws_from_all_but_forbidden_ends() -> None:
    params = SamplingParams(temperature=1e300, min_new_tokens=2, top_p=0.999)
    drawn = select(logits().expand(2_000, -1), rows(2_000, params, ends=(4,)), torch.zeros(2_000))
    assert set(drawn.tolist()) == set(range(VOCABULARY)) - {4}


def test_ends_beyond_the_vocabulary_are_never_drawn() -> None:
    own = rows(2, SamplingParams(temperature=0, min_new_tokens=2), ends=(4, VOCABULARY + 9))
    assert own.ends.tolist() == [[4], [4]]
    rows(2, SamplingParams(min_new_tokens=2), ends=(VOCABULARY,))


def test_no_end_is_drawn_before_its_time() -> None:
    values = torch.zeros(2, VOCABULARY)
    values[:, 4], values[:, 6], values[:, 7] = 3.0, 2.0, 1.0
    own = rows(2, SamplingParams(temperature=0, min_new_tokens=2), ends=(4, 6))
    assert select(values, own, torch.tensor([1, 2])).tolist() == [7, 4]


def test_log_probabilities_are_those_of_the_logits() -> None:
    values = torch.stack([logits(), logits()])
    plain = SamplingParams(temperature=0.5, top_k=2, logprobs=True)
    scaled = SamplingParams(temperature=0.5, logprobs=True, logprobs_after_temperature=True)
    own = Rows.of([plain, scaled], [(0, 0)] * 2, [()] * 2, VOCABULARY, "cpu")
    tokens = torch.tensor([3, 3])
    expected = torch.stack([logits().double(), logits().double() / 0.5]).log_softmax(-1)
    assert_sums_equal(log_probs(values, tokens, own), expected[:, 3], VOCABULARY)
    best, ids = top_log_probs(values, 4, own)
    assert torch.equal(ids, expected.topk(4).indices)
    assert_sums_equal(best, expected.topk(4).values, VOCABULARY)


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1.5]), min_size=1, max_size=30),
    st.integers(1, 20),
)
def test_likeliest_tokens_do_not_depend_on_how_many_are_asked_for(
    values: list[float], count: int
) -> None:
    """Which others in the batch decide; of equal ones those with lower ids come first."""
    scores = torch.tensor([[*values, 0.5]])
    given_rows = Rows.of([SamplingParams()], [(0, 0)], [()], scores.shape[1], "cpu")
    found, ids = top_log_probs(scores, count, given_rows)
    order = sorted(range(scores.shape[1]), key=lambda token: (-float(scores[0, token]), token))
    assert ids[0].tolist() == order[:count]
    expected = scores.double().log_softmax(-1)[0, ids[0]]
    known = expected.isfinite()
    assert (found[0][~known] == -torch.inf).all()
    assert_sums_equal(found[0][known], expected[known].float(), len(values) + 1, size=4.0)
