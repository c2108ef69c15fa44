"""The rewards that a grpo config names, and rows that they can score.

Client-side: no torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from openweights.client.messages import prompt_and_answer
from openweights.errors import closest, shown, spelled
from openweights.jobs.unsloth.config.own_functions import public_functions
from openweights.models.templates.messages import Message

DEFAULT_JUDGE = "gpt-4.1-mini"
GOLD = "gold_response"
JUDGES = ("similarity_judge", "llm_judge", "harm_judge")
TEXT_REWARD_NAMES = ("rouge_l", "ngram_recall", "ngram_match", "caps_spanish")
REWARD_NAMES = (*TEXT_REWARD_NAMES, "overlong", "reasoning_logprob", *JUDGES)
# The others can do without a gold response.
GOLD_REWARDS = ("rouge_l", "ngram_recall", "ngram_match", "reasoning_logprob", "similarity_judge")
# What a value of each says: its scale, and what the upper end is.
REWARD_SCALES = {
    "rouge_l": "0 to 1; 1: the gold response word for word",
    "ngram_recall": "0 to 1; 1: has all word pairs of the gold response and is no longer",
    "ngram_match": "at most 1; 1: has all 2- to 5-grams of the gold response and is as long",
    "caps_spanish": "0 to 2; 2: Spanish, in capitals",
    "overlong": "-1 to 0; 0: has at most half of the tokens that it may have",
    "reasoning_logprob": "at most 0, nats per token; 0: the gold response is certain",
    "similarity_judge": "0 to 1; 1: says the same as the gold response",
    "llm_judge": "0 to 1; 1: correct, complete and helpful",
    "harm_judge": "0 to 1; 1: dangerous or wrong, as llm_judge of the older runner",
}
LARGEST_WEIGHT = 1e15  # of a reward, whose product with it 32 bits must hold
BEST = 10.0  # what judges give at most, unless grpo_judge_best says another number
JUDGE_FIELDS = ("answer", "prompt", "reference")

_SHOWN = 12  # functions of a file, in a message

FUNCTION_FIELDS = ("grpo_reward_function", "sdft_gate_reward")

RewardSpec = str | list[str] | dict[str, float]

_OWN = re.compile(r"(?P<file>.+\.py|custom_job_file:file-[0-9a-f]+):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class RewardChoice:
    """One reward of a config.

    Attributes:
        name: A built-in reward, or the function in `file`.
        weight: Its factor in the sum.
        file: Python file of the user's, a local path or a file id; None for a built-in reward.
    """

    name: str
    weight: float
    file: str | None = None

    @property
    def is_stored(self) -> bool:
        """Whether its file is in the store."""
        return self.file is not None and self.file.startswith("custom_job_file:")


def reward_choices(spec: RewardSpec) -> list[RewardChoice]:
    """The rewards that `grpo_reward_function` names.

    Raises:
        ValueError: One has no such name, or a weight that cannot be used.
    """
    weighted = spec if isinstance(spec, dict) else dict.fromkeys(_names(spec), 1.0)
    if not weighted:
        raise ValueError(f"is empty; name one of {', '.join(REWARD_NAMES)} or 'file.py:function'")
    choices = [_choice(name, weight) for name, weight in weighted.items()]
    names = [choice.name for choice in choices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"names {twice[0]!r} twice; give each reward once, with a weight")
    return choices


def own_functions(given: object) -> list[RewardChoice]:
    """The local files' functions that a value names, whatever else may be wrong with it."""
    names: Iterable[object] = [given] if isinstance(given, str) else ()
    if isinstance(given, list | dict):
        names = cast("Iterable[object]", given)
    found = [_OWN.fullmatch(name) for name in names if isinstance(name, str)]
    choices = [RewardChoice(own["function"], 1.0, own["file"]) for own in found if own]
    return [choice for choice in choices if not choice.is_stored]


def judge_prompt_fields(prompt: str) -> set[str]:
    """Those of `JUDGE_FIELDS` that a judge's question fills in."""
    return set(re.findall(rf"\{{({'|'.join(JUDGE_FIELDS)})\}}", prompt))


def check_gate_reward(spec: str) -> None:
    """See that the teacher gate of SDFT can compare by a reward.

    Raises:
        ValueError: It has no such name, or asks a model.
    """
    [choice] = reward_choices(spec)
    if choice.file is None and choice.name not in TEXT_REWARD_NAMES:
        raise ValueError(
            f"{shown(choice.name)} is not told by the answer alone; use "
            f"{spelled(TEXT_REWARD_NAMES)}, or 'file.py:function' for your own"
        )


def _names(spec: str | list[str]) -> list[str]:
    names = [spec] if isinstance(spec, str) else spec
    if len(set(names)) < len(names):
        raise ValueError("names a reward twice; give each once, with a weight: {name: weight}")
    return names


def _choice(name: str, weight: float) -> RewardChoice:
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"weight of {name!r} is {weight}; give a finite number other than 0")
    if not 1 / LARGEST_WEIGHT <= abs(weight) <= LARGEST_WEIGHT:
        raise ValueError(
            f"weight of {name!r} is {weight}, which 32-bit sums cannot hold; give one of a size "
            f"from {1 / LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
        )
    if name in REWARD_NAMES:
        return RewardChoice(name, weight)
    if own := _OWN.fullmatch(name):
        return RewardChoice(own["function"], weight, own["file"])
    if name.endswith(".py"):
        raise ValueError(_without_function(name))
    meant = closest(name, REWARD_NAMES)
    remedy = f"did you mean {meant!r}?" if meant else f"use {spelled(REWARD_NAMES)}"
    raise ValueError(f"{shown(name)} is no reward; {remedy} (or 'file.py:function' for your own)")


def _without_function(name: str) -> str:
    found = public_functions(Path(name))[:_SHOWN]
    listed = f"; it has {', '.join(found)}" if found else ""
    example = f"{name}:{found[0] if found else 'score'}"
    return f"{shown(name)} is a file; name its function: {shown(example)}{listed}"


def refuse_functions(value: object) -> None:
    """See that rewards are named.

    Raises:
        ValueError: One is a function object, which cannot travel with a job.
    """
    given: Iterable[object] = value if isinstance(value, list | tuple | dict) else [value]  # pyright: ignore[reportUnknownVariableType]
    for item in given:
        if callable(item):
            name = getattr(item, "__name__", "function")
            raise ValueError(
                f"{name} is a function object, which cannot travel with the job; give "
                f"'file.py:{name}'"
            )


def with_files(spec: RewardSpec, files: Mapping[str, str]) -> RewardSpec:
    """The same rewards with other names for the files: path -> file id."""

    def renamed(name: str) -> str:
        own = _OWN.fullmatch(name)
        return f"{files.get(own['file'], own['file'])}:{own['function']}" if own else name

    if isinstance(spec, str):
        return renamed(spec)
    if isinstance(spec, list):
        return [renamed(name) for name in spec]
    return {renamed(name): weight for name, weight in spec.items()}


def split_gold(row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """The prompt's messages and the gold response of a `conversations` row.

    The gold response is the last message when it is the assistant's, else the row's own
    `gold_response`, else None.

    Raises:
        ValueError: There is no prompt that ends with a user turn, or there are two gold responses.
    """
    messages, answer = prompt_and_answer(row)
    gold = row.get(GOLD)
    if answer is not None and gold is not None:
        raise ValueError(
            f"{GOLD}: is given, and the last message is from the assistant; keep one of them"
        )
    gold = answer if gold is None else gold
    if gold is not None and (not isinstance(gold, str) or not gold.strip()):
        raise ValueError(f"{GOLD}: must be a text that is not empty; correct it")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            "messages: the turn before the answer must be from the user, so that there is a "
            "prompt to answer; add one"
        )
    return messages, gold


def check_grpo_row(row: Mapping[str, Any], rewards: RewardSpec) -> None:
    """See that the rewards can score answers to the row.

    Raises:
        ValueError: They cannot.
    """
    _, gold = split_gold(row)
    names = [choice.name for choice in reward_choices(rewards)]
    needs = [name for name in names if name in GOLD_REWARDS]
    if gold is None and needs:
        raise ValueError(
            f"messages: the last is not from the assistant, and {needs[0]} compares with a gold "
            f"response; add the answer as last message, or {GOLD!r}"
        )
