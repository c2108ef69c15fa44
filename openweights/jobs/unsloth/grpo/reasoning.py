"""The reward `reasoning_logprob`: how likely the gold response is after the completion's reasoning.

Verifies reasoning without a verifier: the mean log-probability per token of the gold response,
given prompt and reasoning, under the policy itself as it is now, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from openweights.jobs.unsloth.rewards import Reward, Samples
from openweights.models.log_probs import mean_target_log_probs
from openweights.models.template import Message

NAME = "reasoning_logprob"


def reasoning_reward(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weight: float,
    *,
    prompt_ids: Callable[[list[Message]], list[int]],
    batch_size: int,
) -> Reward:
    """The reward, in nats per token, at most 0.

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

    return Reward(NAME, weight, score)


def reasoning_part(text: str, think_end_tag: str) -> str:
    """The completion up to and with the tag that ends its reasoning; all of it without one."""
    before, tag, _ = text.partition(think_end_tag)
    return before + tag if tag else text.rstrip()
