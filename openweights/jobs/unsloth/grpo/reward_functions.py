"""The reward functions of a GRPO run: the user's, the policy's own, and how all are asked."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.grpo.own_code import undisturbed
from openweights.jobs.unsloth.grpo.own_rewards import (
    calling,
    ended_by_exit,
    found_reward,
    values_of,
)
from openweights.jobs.unsloth.rewards import Reward, Samples
from openweights.models.log_probs import mean_target_log_probs
from openweights.models.templates.messages import Message

REASONING = "reasoning_logprob"


def own_reward(
    path: Path, function_name: str, weight: float, *, field: str = "grpo_reward_function"
) -> Reward:
    """`found_reward`, whose file changes nothing of ours when it is run.

    Raises:
        ConfigError: The file cannot be run, or has no such function.
    """
    with undisturbed():
        return found_reward(path, function_name, weight, field=field)


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
            return [values_of(*pair, count) for pair in zip(self.rewards, results, strict=True)]

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
