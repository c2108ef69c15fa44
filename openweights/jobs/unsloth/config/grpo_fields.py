"""The door checks of loss='grpo': reward functions, batches of whole groups, room for completions.

Client-side: no torch here.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError, closest, shown, spelled
from openweights.models.template import Message, flat_text

if TYPE_CHECKING:
    from openweights.jobs.unsloth.validate import TrainingConfig

DEFAULT_JUDGE = "gpt-4.1-mini"
GOLD = "gold_response"
JUDGES = ("similarity_judge", "llm_judge")
REWARD_NAMES = ("rouge_l", "ngram_recall", "caps_spanish", "reasoning_logprob", *JUDGES)
# The others can do without a gold response.
GOLD_REWARDS = ("rouge_l", "ngram_recall", "reasoning_logprob", "similarity_judge")

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


def _names(spec: str | list[str]) -> list[str]:
    names = [spec] if isinstance(spec, str) else spec
    if len(set(names)) < len(names):
        raise ValueError("names a reward twice; give each once, with a weight: {name: weight}")
    return names


def _choice(name: str, weight: float) -> RewardChoice:
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"weight of {name!r} is {weight}; give a finite number other than 0")
    if name in REWARD_NAMES:
        return RewardChoice(name, weight)
    if own := _OWN.fullmatch(name):
        return RewardChoice(own["function"], weight, own["file"])
    meant = closest(name, REWARD_NAMES)
    remedy = f"did you mean {meant!r}?" if meant else f"use {spelled(REWARD_NAMES)}"
    raise ValueError(f"{shown(name)} is no reward; {remedy} (or 'file.py:function' for your own)")


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


def grpo_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """What is wrong between the fields of a grpo config, as (field, what; what to do)."""
    if config.loss != "grpo":
        return
    yield from _batch_problems(config)
    if config.grpo_max_completion_length >= config.max_seq_length:
        yield (
            "grpo_max_completion_length",
            f"is {config.grpo_max_completion_length}, which leaves no room for a prompt within "
            f"max_seq_length={config.max_seq_length}; lower it, or raise max_seq_length",
        )
    names = {choice.name for choice in reward_choices(config.grpo_reward_function)}
    if config.grpo_judge_model != DEFAULT_JUDGE and not names & set(JUDGES):
        judges = " or ".join(repr(name) for name in JUDGES)
        yield (
            "grpo_judge_model",
            f"only counts with {judges} in grpo_reward_function; remove it, or add one",
        )
    if config.beta > 0 and config.lora_bias == "all":
        yield (
            "lora_bias",
            "'all' trains the base model's own biases, so that there is no reference model for "
            "beta; use lora_bias='none', or beta=0",
        )
    if config.grpo_use_vllm and config.engine == "unsloth":
        yield "grpo_use_vllm", "needs engine='transformers' or 'auto'; change one of the two"


def _batch_problems(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """A step of one process must hold whole groups; several processes then do, too."""
    group, batch = config.grpo_num_generations, step_size(config)
    if batch % group:
        yield (
            "grpo_num_generations",
            f"is {group}, but a step has per_device_train_batch_size * gradient_accumulation_steps "
            f"= {batch} completions, which holds no whole number of groups; make it a multiple of "
            f"{group}",
        )


def step_size(config: TrainingConfig) -> int:
    """Completions in an optimizer step of one process."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def split_gold(row: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    """The prompt's messages and the gold response of a `conversations` row.

    The gold response is the last message when it is the assistant's, else the row's own
    `gold_response`, else None.

    Raises:
        ValueError: There is no prompt that ends with a user turn, or there are two gold responses.
    """
    if "messages" not in row:
        raise ValueError("messages: is missing; loss='grpo' needs conversations, not plain text")
    messages = [{"role": m["role"], "content": flat_text(m["content"])} for m in row["messages"]]
    gold = row.get(GOLD)
    if messages and messages[-1]["role"] == "assistant":
        if gold is not None:
            raise ValueError(
                f"{GOLD}: is given, and the last message is from the assistant; keep one of them"
            )
        gold = messages.pop()["content"]
    if gold is not None and (not isinstance(gold, str) or not gold.strip()):
        raise ValueError(f"{GOLD}: must be a text that is not empty; correct it")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(
            "messages: the turn before the answer must be from the user, so that there is a "
            "prompt to answer; add one"
        )
    return messages, gold


def check_grpo_row(row: Mapping[str, Any], config: TrainingConfig) -> None:
    """See that the rewards can score answers to the row.

    Raises:
        ValueError: They cannot.
    """
    _, gold = split_gold(row)
    names = [choice.name for choice in reward_choices(config.grpo_reward_function)]
    needs = [name for name in names if name in GOLD_REWARDS]
    if gold is None and needs:
        raise ValueError(
            f"messages: the last is not from the assistant, and {needs[0]} compares with a gold "
            f"response; add the answer as last message, or {GOLD!r}"
        )


def check_source(path: Path, function: str) -> None:
    """See that a Python file has the function, without running it.

    Raises:
        ConfigError: It cannot be read, is no Python, or binds no such name.
    """
    place = f"grpo_reward_function: {path}"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; correct the path") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{place}: is no Python ({error}); correct it") from None
    if function not in set(_bound_names(tree)):
        raise ConfigError(f"{place}: has no function {function!r}; define it, or correct its name")


def _bound_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
