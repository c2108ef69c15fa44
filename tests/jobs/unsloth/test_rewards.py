"""Rewards of texts, the user's own functions, and what comes of those that fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights.errors import ConfigError, JobFailedError
from openweights.jobs.unsloth.config.grpo_fields import REWARD_NAMES, REWARD_SCALES
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions, own_reward
from openweights.jobs.unsloth.rewards import (
    TEXT_REWARDS,
    Reward,
    Samples,
    caps_spanish,
    ngram_match,
    ngram_recall,
    overlong_reward,
    rouge_l,
    text_reward,
)

TEXT = st.text(alphabet="abc ABC,.é1", max_size=30)


def samples(completions: list[str], golds: list[str | None], **columns: list[Any]) -> Samples:
    rows = [
        {"gold_response": gold, **{name: values[i] for name, values in columns.items()}}
        for i, gold in enumerate(golds)
    ]
    prompts = [[{"role": "user", "content": "Say it."}] for _ in completions]
    return Samples(prompts, completions, [[7]] * len(completions), rows)


def longest_common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + longest_common(left[:-1], right[:-1])
    return max(longest_common(left[:-1], right), longest_common(left, right[:-1]))


def test_rouge_l_is_the_published_measure() -> None:
    # Lin (2004), section 3.1: of these two the first shares "police the gunman".
    gold = "police killed the gunman"
    assert rouge_l("police kill the gunman", gold) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", gold) == pytest.approx(2 / 4)
    assert rouge_l("", gold) == rouge_l(gold, "") == 0
    assert rouge_l("POLICE, killed the Gunman!", gold) == 1


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_l_equals_its_definition(answer: list[str], gold: list[str]) -> None:
    common = longest_common(answer, gold)
    expected = 2 * common / (len(answer) + len(gold)) if common else 0.0
    assert rouge_l(" ".join(answer), " ".join(gold)) == pytest.approx(expected)


def test_ngram_recall_counts_and_does_not_pay_for_length() -> None:
    gold = "the cat sat down"
    assert ngram_recall(gold, gold) == 1
    assert ngram_recall("the cat sat", gold) == pytest.approx(2 / 3)
    assert ngram_recall("the the the cat cat", gold) == pytest.approx(1 / 3 * 4 / 5)
    assert ngram_recall("", gold) == ngram_recall(gold, "") == 0
    assert ngram_recall("Yes.", "yes") == 1, "a gold response of one word"
    longer = [ngram_recall(f"{gold} {'and more ' * n}", gold) for n in range(5)]
    assert longer == sorted(longer, reverse=True) and longer[-1] < 0.4


def test_ngram_match_is_the_older_recall() -> None:
    gold = "the cat sat on the mat"
    assert ngram_match(gold, gold) == ngram_match(gold.upper(), gold) == 1
    assert ngram_match(f"{gold} {gold}", gold) == 0, "all of it, at twice the length"
    assert ngram_recall(f"{gold} {gold}", gold) == 0.5
    # Of 5 + 4 + 3 + 2 different grams 2 + 1 are held; half of the words are missing.
    assert ngram_match("the cat sat", gold) == pytest.approx(3 / 14 - 1 / 2)
    assert ngram_match("a " * 18, gold) == -2 and ngram_match("a", "") == 0
    assert ngram_match("yes", "yes") == 0, "a single word has no grams"


def test_caps_spanish_adds_two_halves() -> None:
    assert caps_spanish("ESTO ES UNA COSA") == 2
    assert caps_spanish("esto es una cosa") == 1
    assert caps_spanish("HELLO THERE FRIEND") == 1
    assert caps_spanish("El perro come mucho pan") == pytest.approx(1 / 19 + 1)
    assert caps_spanish("Whales sing una canción. Nobody hears them today, though.") == (
        pytest.approx(2 / 46 + 4 / 9)
    )
    assert caps_spanish("12 + 3 = 15!") == caps_spanish("") == caps_spanish("…") == 0
    assert caps_spanish("Y " * 40) == pytest.approx(1 + 0.4), "no reward for one word alone"
    text = "el perro y la casa de mi madre no son de los otros que viven en la ciudad con su hijo"
    assert caps_spanish(text) == caps_spanish(f"{text} {text}") == 1
    english = "The era of the sea: I hay no idea, dice a van, as he come so no one has a sin, ten"
    assert caps_spanish(english.lower()) == 0, "words that are English, too"


@given(answer=TEXT, gold=TEXT)
def test_text_rewards_have_their_bounds(answer: str, gold: str) -> None:
    for name, function in TEXT_REWARDS.items():
        value = function(answer, gold)
        assert value <= (2 if name == "caps_spanish" else 1)
        assert value >= 0 or name == "ngram_match"
    assert REWARD_SCALES.keys() == set(REWARD_NAMES)


def test_overlong_is_what_the_older_runner_takes_off() -> None:
    lengths = [0, 50, 51, 75, 100, 120]
    given = replace(samples(["x"] * 6, ["y"] * 6), completion_ids=[[1] * n for n in lengths])
    [values] = RewardFunctions([overlong_reward(100, 1.0)], limit_s=1).score(given)
    assert values == pytest.approx([0, 0, -0.02, -0.5, -1, -1])


def test_only_the_answer_is_judged() -> None:
    given = samples(["<think>NO, NO</think> hello", "HOLA</think>", "HOLA"], ["x"] * 3)
    assert RewardFunctions([text_reward("caps_spanish", 1.0)], limit_s=1).score(given) == [
        [0.0, 0.0, 2.0]
    ]


def own(tmp_path: Path, source: str, name: str = "score") -> Reward:
    path = tmp_path / "my_rewards.py"
    path.write_text(source)
    return own_reward(path, name, 1.0)


def test_own_functions_get_what_they_have_parameters_for(tmp_path: Path) -> None:
    given = samples(["a", "bb"], ["x", "yy"], level=[1, 3], note=["n", None])
    source = """
def score(completions, gold_response, level):
    return [len(c) + len(g) + l for c, g, l in zip(completions, gold_response, level)]

def everything(completions, **rest):
    assert sorted(rest) == ["completion_ids", "gold_response", "level", "note", "prompts"], rest
    assert rest["prompts"][0][0]["content"] == "Say it." and rest["note"] == ["n", None]
    return [1, None]

async def later(completions):
    import asyncio
    await asyncio.sleep(0.01)
    return (float(len(c)) for c in completions)
"""
    rewards = [own(tmp_path, source, name) for name in ("score", "everything", "later")]
    [first, second, third] = RewardFunctions(rewards, limit_s=5).score(given)
    assert first == [3, 7] and third == [1, 2]
    assert second[0] == 1 and math.isnan(second[1])
    assert list(rewards[1].causes) == ["it gave None or no finite number"]


def test_own_functions_that_take_too_long_fail(tmp_path: Path) -> None:
    source = "import asyncio\nasync def score(completions):\n    await asyncio.sleep(60)\n"
    reward = own(tmp_path, source)
    [values] = RewardFunctions([reward], limit_s=0.05).score(samples(["a"], ["b"]))
    assert math.isnan(values[0]) and list(reward.causes) == ["no answer within 0.05 s"]


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("x = (", ConfigError, r"my_rewards.py: cannot be run \(SyntaxError"),
        ("import no_such_module", ConfigError, "cannot be run .ModuleNotFoundError"),
        ("def other(): pass", ConfigError, "has no function 'score'; define it"),
        ("score = 3", ConfigError, "has no function 'score'"),
        ("def score(completions):\n    return 1 / 0", JobFailedError, r"ZeroDivisionError.*line 2"),
        ("async def score(completions):\n    return 1 / 0", JobFailedError, "ZeroDivisionError"),
        ("async def score(completions):\n    raise TimeoutError('slow')", JobFailedError, "slow"),
        ("def score(completions):\n    raise TimeoutError('slow')", JobFailedError, "slow"),
        ("def score(nothing):\n    return [1]", JobFailedError, "missing 1 required"),
        ("def score(completions):\n    return [1, 2]", JobFailedError, "each of the 1 completions"),
        ("def score(completions):\n    return 5", JobFailedError, "must return a list .* not 5"),
        ("def score(completions):\n    pass", JobFailedError, "must return a list .* not None"),
        (
            "def score(completions):\n    return ['x']",
            JobFailedError,
            "gave 'x', which is text; give",
        ),
        ("import sys\nsys.exit(0)\ndef score(completions): ...", ConfigError, "SystemExit: 0"),
        ("import sys\ndef score(completions):\n    sys.exit(0)", JobFailedError, "line 3"),
        ("import sys\nasync def score(completions):\n    sys.exit()", JobFailedError, "was called"),
        ("def score(completions):\n    yield 1 / 0", JobFailedError, "ZeroDivisionError.*line 2"),
        ("import json\ndef score(completions):\n    json.loads('{')", JobFailedError, "line 3"),
        ("score = max", ConfigError, "does not say what it takes; write a function around it"),
        ("def score(completions, /):\n    return [1]", ConfigError, "remove the '/'"),
    ],
)
def test_own_functions_that_are_wrong_end_the_run(
    tmp_path: Path, source: str, error: type[Exception], words: str
) -> None:
    def attempt() -> None:
        RewardFunctions([own(tmp_path, source)], limit_s=5).score(samples(["a"], ["b"]))

    with pytest.raises(error, match=words):
        attempt()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, 1e39, -(10**300)])
def test_no_finite_number_is_a_failure_not_zero(value: Any) -> None:
    function: Callable[[Samples], Any] = lambda given: [0, value]  # noqa: E731
    [values] = RewardFunctions([Reward("mine", 1.0, function)], limit_s=1).score(
        samples(["a"] * 2, ["b"] * 2)
    )
    assert values[0] == 0 and math.isnan(values[1])
