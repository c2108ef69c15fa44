"""Parameters that cannot work are refused by name, with what would."""

from __future__ import annotations

from typing import Any

import pytest

from openweights.errors import ConfigError
from openweights.generation.params import Delta, SamplingParams, derived_seed, joined


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "temperature: is -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": 0}, "top_k.*None"),
        ({"n": 0}, "n: is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 300}, "min_new_tokens: is 300, above max_new_tokens=256"),
        ({"stop": ("a", "")}, "stop.*empty"),
        ({"stop": ("a",), "detokenize": False}, "stop: needs detokenize"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"seed": -1}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"temperature": -1, "top_p": 2}, "temperature.*; top_p"),
        ({"stop": "ab"}, "stop: is 'ab'; give a tuple of texts"),
        ({"stop": ("a", 5)}, "stop: is .'a', 5.; give a tuple of texts"),
        ({"n": 2.0}, "n: is 2.0; give a whole number"),
        ({"n": True}, "n: is True; give a whole number"),
        ({"seed": None}, "seed: is None; give a whole number"),
        ({"top_k": "5"}, "top_k: is '5'; give a whole number"),
        (
            {"temperature": "hot", "stop_token_ids": 5},
            "temperature: is 'hot'.*; stop_token_ids: is 5",
        ),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SamplingParams(**wrong)


def test_the_ends_of_each_range_are_taken() -> None:
    SamplingParams(
        temperature=0, top_p=1, min_p=1, top_k=1, presence_penalty=-2, min_new_tokens=256
    )


def test_derived_seeds_differ_by_each_part_and_its_place() -> None:
    seeds = [derived_seed(*parts) for parts in [(1, 2), (2, 1), (1, 2, 0), (12,), (1,)]]
    assert len(set(seeds)) == 5 and derived_seed(1, 2) == seeds[0]
    assert SamplingParams().with_seed(1, 2).seed == seeds[0]


def test_deltas_join_to_a_completion() -> None:
    deltas = [
        Delta("a", 0, [1, 2], "x", None, [-1.0, -2.0], [{1: -1.0}, {2: -2.0}]),
        Delta("a", 0, [], "y", "stop"),
    ]
    whole = joined(deltas)
    assert (whole.token_ids, whole.text, whole.ended) == ([1, 2], "xy", True)
    assert whole.logprobs == [-1.0, -2.0] and whole.top_logprobs == [{1: -1.0}, {2: -2.0}]
