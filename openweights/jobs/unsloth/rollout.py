"""Sampling completions from the model that is trained: the on-policy half of SDFT and GRPO."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.generation.engine import GenerationEngine
from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.jobs.unsloth.validate import TrainingConfig


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion for each prompt, in their order.

    Attributes:
        seconds: Wall-clock time of the call.
    """

    completions: list[Completion]
    seconds: float

    @property
    def tokens(self) -> int:
        """Generated tokens in all."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def ended(self) -> int:
        """Completions that ended by themselves."""
        return sum(completion.ended for completion in self.completions)


def roll_out(
    engine: GenerationEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    adapter: str | None,
    *,
    seed: Sequence[int],
) -> Rollout:
    """Complete each prompt once.

    Equal prompts that follow one another are read once; their completions are drawn apart.

    Args:
        adapter: The one that is trained.
        seed: What tells this call from others, such as seed, step and rank of a run.
    """
    started = time.perf_counter()
    requests: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts):
        if requests and prompt == requests[-1].prompt_ids:
            requests[-1] = requests[-1].with_samples(requests[-1].params.n + 1)
        else:
            own = params.with_seed(*seed, index)
            requests.append(GenerationRequest(prompt, own, adapter))
    completions = [one for own in engine.generate(requests) for one in own]
    return Rollout(completions, time.perf_counter() - started)


def sampling_params(config: TrainingConfig) -> SamplingParams:
    """How SDFT draws; the engine's own end tokens end a completion."""
    return SamplingParams(
        max_new_tokens=config.sdft_max_new_tokens,
        temperature=config.sdft_temperature,
        top_p=config.sdft_top_p,
        detokenize=False,
    )


def grpo_sampling_params(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> SamplingParams:
    """How GRPO draws: with log-probabilities as its loss needs them.

    Args:
        ends: What ends a completion beside the stop texts of the config, of which those that are
            special tokens of the tokenizer end it as such.
    """
    own: Any = tokenizer  # whose type does not tell its methods
    special: dict[str, int] = own.get_added_vocab()
    tokens = [special[text] for text in config.grpo_stop if text in special]
    return SamplingParams(
        max_new_tokens=config.grpo_max_completion_length,
        temperature=config.grpo_temperature,
        top_p=config.grpo_top_p,
        top_k=config.grpo_top_k,
        stop_token_ids=(*ends, *tokens),
        stop=tuple(text for text in config.grpo_stop if text not in special),
        detokenize=any(text not in special for text in config.grpo_stop),
        skip_special_tokens=not config.grpo_keep_special_tokens,
        logprobs=True,
        logprobs_after_temperature=True,
    )
