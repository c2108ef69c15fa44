"""The reward functions of a GRPO run: the user's, the policy's own, and how all are asked."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.errors import ConfigError, JobFailedError, shown
from openweights.jobs.unsloth.grpo.own_code import (
    calling,
    ended_by_exit,
    run_file,
    undisturbed,
)
from openweights.jobs.unsloth.rewards import LARGEST, Reward, Samples
from openweights.models.log_probs import mean_target_log_probs
from openweights.models.templates.messages import Message

REASONING = "reasoning_logprob"


def own_reward(
    path: Path, function_name: str, weight: float, *, field: str = "grpo_reward_function"
) -> Reward:
    """A function of a Python file, which `field` names, as a reward.

    It is called with those of these that it has parameters for: `completions` (texts), `prompts`
    (lists of messages), `completion_ids`, `gold_response` and the other columns of the dataset, a
    list each; and returns a number for each completion, or None where it cannot say, as a list, a
    tensor or an array. It may be a coroutine function. What it is given are copies.

    Raises:
        ConfigError: The file cannot be run, or has no such function.
    """
    place, path = f"{field}: {path.name}", path.absolute()
    function = getattr(run_file(path, place), function_name, None)
    if not callable(function):
        raise ConfigError(f"{place}: has no function {function_name!r}; define it, or correct it")
    takes = _parameters(function, f"{place}: {function_name}")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())

    def score(samples: Samples) -> Any:
        given = {k: v for k, v in _arguments(samples).items() if takes_all or k in takes}
        with calling(function_name, path):
            return function(**copy.deepcopy(given))

    return Reward(function_name, weight, score, file=path)


def _parameters(function: Callable[..., Any], place: str) -> Mapping[str, inspect.Parameter]:
    try:
        takes = inspect.signature(function).parameters
    except ValueError:
        raise ConfigError(
            f"{place} does not say what it takes; write a function around it: "
            "def score(completions): …"
        ) from None
    if any(p.kind is p.POSITIONAL_ONLY for p in takes.values()):
        raise ConfigError(f"{place} is called by the names of its arguments; remove the '/'")
    return takes


def _arguments(samples: Samples) -> dict[str, Any]:
    columns = {name for row in samples.rows for name in row}
    given = {name: [row.get(name) for row in samples.rows] for name in columns}
    return given | {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
    }


def reasoning_reward(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weight: float,
    *,
    prompt_ids: Callable[[list[Message]], list[int]],
    batch_size: int,
) -> Reward:
    """How likely the gold response is after a completion's reasoning: nats per token, at most 0.

    Verifies reasoning without a verifier: the mean log-probability per token of the gold response,
    given prompt and reasoning, under the policy itself as it is now, without gradient.

    Args:
        model: The policy.
        prompt_ids: Renders a prompt as the policy reads it.
        batch_size: Rows in one forward.
    """

    def score(samples: Samples) -> list[float]:
        pairs: list[tuple[list[int], list[int]]] = []
        for prompt, text, gold in zip(
            samples.prompts, samples.completions, samples.golds, strict=True
        ):
            reasoning = f"{reasoning_part(text, samples.think_end_tag)}\n\n"
            ids = tokenizer(reasoning, add_special_tokens=False)["input_ids"]
            wanted = list(tokenizer(gold, add_special_tokens=False)["input_ids"])
            pairs.append(([*prompt_ids(prompt), *ids], wanted))
        pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        return mean_target_log_probs(model, pairs, pad, batch_size=batch_size)

    return Reward(REASONING, weight, score)


def reasoning_part(text: str, think_end_tag: str) -> str:
    """The completion up to and with the tag that ends its reasoning; all of it without one."""
    before, tag, _ = text.partition(think_end_tag)
    return before + tag if tag else text.rstrip()


class RewardFunctions:
    """Scores the completions of a step with all rewards of a run, coroutines side by side.

    Those run in a thread of their own, so that none of them can hold up a step for longer than
    `limit_s`.
    """

    def __init__(self, rewards: Sequence[Reward], *, limit_s: float) -> None:
        self.rewards = list(rewards)
        self._limit_s = limit_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, samples: Samples) -> list[list[float]]:
        """For each reward a value for each completion, NaN where it failed.

        Raises:
            JobFailedError: A reward function of the user's is wrong.
        """
        for reward in self.rewards:
            reward.causes.clear()
        count = len(samples.completions)
        with undisturbed():
            given: list[Any] = [reward.score(samples) for reward in self.rewards]
            results = self._finish(given)
            return [_values(*pair, count) for pair in zip(self.rewards, results, strict=True)]

    def _finish(self, given: list[Any]) -> list[Any]:
        """What was given, of coroutines what they return; None of those that take too long."""
        if not any(inspect.isawaitable(g) for g in given):
            return given
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        futures = [
            asyncio.run_coroutine_threadsafe(_awaited(g), self._loop)
            if inspect.isawaitable(g)
            else None
            for g in given
        ]
        end, results = time.monotonic() + self._limit_s, []
        for reward, value, future in zip(self.rewards, given, futures, strict=True):
            with calling(reward.name, reward.file):
                try:
                    left = max(end - time.monotonic(), 0.0)
                    results.append(value if future is None else future.result(left))
                except TimeoutError:
                    assert future is not None
                    if future.done():  # it is the function's own
                        raise
                    future.cancel()
                    reward.causes[f"no answer within {self._limit_s:g} s"] += 1
                    results.append(None)
        return results


async def _awaited(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except SystemExit as error:  # would end the loop, and nobody would hear of it
        raise ended_by_exit(error) from error


def _values(reward: Reward, result: Any, count: int) -> list[float]:
    """One number for each completion; NaN where there is none.

    Lists and whatever else has an order will do, tensors and arrays among them.
    """
    if result is None and reward.causes:
        return [math.nan] * count
    given = _plain(result)
    has_order = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Set)
    with calling(reward.name, reward.file):  # a generator's body runs here
        values: list[Any] = list(given) if has_order else []
    if len(values) != count:
        raise JobFailedError(
            f"reward {reward.name}: must return a list with one number for each of the {count} "
            f"completions, not {shown(result)}; correct it"
        )
    numbers = [_number(reward, value) for value in values]
    if any(map(math.isnan, numbers)) and not reward.causes:
        reward.causes["it gave None or no finite number"] += 1
    return numbers


def _plain(value: Any) -> Any:
    """Tensors, arrays and series as lists or numbers, everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _only(value: Any) -> Any:
    """What a dict or a list holds where that is one thing, everything else as it is."""
    parts: Any = value.values() if isinstance(value, Mapping) else value
    return next(iter(parts)) if isinstance(value, Mapping | list) and len(value) == 1 else value


def _number(reward: Reward, value: Any) -> float:
    """A completion's value: a number, the text of one, or a dict or list that holds just one."""
    inner = _only(_plain(value))
    try:
        number = math.nan if inner is None else float(inner)
    except (TypeError, ValueError, OverflowError):
        raise JobFailedError(
            f"reward {reward.name}: gave {shown(value)}; give numbers, or None for a completion "
            "that cannot be scored"
        ) from None
    if math.isfinite(number) and abs(number) > LARGEST:
        reward.causes[f"it gave a number beyond {LARGEST:g}, which 32-bit sums cannot hold"] += 1
        return math.nan
    return number if math.isfinite(number) else math.nan
