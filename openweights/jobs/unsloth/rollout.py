"""Sampling completions from the model that is trained: the on-policy half of SDFT and GRPO."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.generation.engine import GenerationEngine
from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.jobs.unsloth.runtime.ranks import of_all_ranks, own_share
from openweights.jobs.unsloth.validate import TrainingConfig

COMPLETIONS_LOGGED = 4
_LOGGED_EACH_STEP, _LOGGED_EVERY = 10, 10


def tells_completions(step: int, steps: int) -> bool:
    """Whether some of a step's completions are logged: those of the first steps, of every so many
    later, and of the last, which the rest leads to.

    Args:
        step: Steps before it.
        steps: Of the whole training.
    """
    return step < _LOGGED_EACH_STEP or step % _LOGGED_EVERY == 0 or step == steps - 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion for each prompt of a step, of all ranks, in their order.

    Attributes:
        own: Prompts that this rank has sampled, by their indices.
        seconds: Wall-clock time until all ranks had theirs.
        waiting_s: How much of it this rank waited for the others.
    """

    completions: list[Completion]
    own: list[int]
    seconds: float
    waiting_s: float

    @property
    def tokens(self) -> int:
        """Generated tokens in all."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def ended(self) -> int:
        """Completions that ended by themselves."""
        return sum(completion.ended for completion in self.completions)


class StepSampler:
    """Completes the prompts of a step, each rank a part of them.

    Who samples what changes no completion, as each has a seed of its own. How long they will be
    nobody knows: a prompt is expected to be answered as briefly as it was the last time, and one
    that is new as the others were. By that the ranks get equal work, and begin with the longest.

    Args:
        engine: Draws the completions.
        params: How.
    """

    def __init__(self, engine: GenerationEngine, params: SamplingParams) -> None:
        self._engine = engine
        self._params = params
        # Tokens of a completion when it was last sampled, by the hash of its prompt.
        self._lengths: dict[int, float] = {}

    def sample(
        self, prompts: Sequence[Sequence[int]], adapter: str | None, *, seed: Sequence[int]
    ) -> Rollout:
        """Complete each prompt once; every rank must ask, with the prompts of all.

        Equal prompts that follow one another, as those of a group, are read once, and their
        completions drawn apart by one rank.

        Args:
            adapter: The one that is trained.
            seed: What tells this call from others, such as seed and step of a run.
        """
        started = time.perf_counter()
        requests = sampling_requests(prompts, self._params, adapter, seed)
        firsts = list(accumulate((request.params.n for request in requests), initial=0))
        mine = own_share(self._expected(requests))
        own = [index for at in mine for index in range(firsts[at], firsts[at + 1])]
        completed = self._engine.generate([requests[at] for at in mine])
        sampled = time.perf_counter()
        found = dict(chain(*of_all_ranks(list(zip(own, chain(*completed), strict=True)))))
        ended = time.perf_counter()
        completions = [found[index] for index in range(len(prompts))]
        for at, request in enumerate(requests):
            lengths = [len(one.token_ids) for one in completions[firsts[at] : firsts[at + 1]]]
            self._lengths[_key(request)] = sum(lengths) / len(lengths)
        return Rollout(completions, sorted(own), ended - started, ended - sampled)

    def _expected(self, requests: Sequence[GenerationRequest]) -> list[float]:
        """Tokens that each will hold in the cache when its completions have ended."""
        known = self._lengths
        usual = sum(known.values()) / len(known) if known else self._params.max_new_tokens
        return [
            len(request.prompt_ids) + request.params.n * known.get(_key(request), usual)
            for request in requests
        ]


def _key(request: GenerationRequest) -> int:
    # Of two prompts with one hash a length is taken for the other's, which changes no result.
    return hash(tuple(request.prompt_ids))


def sampling_requests(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    adapter: str | None,
    seed: Sequence[int],
) -> list[GenerationRequest]:
    """A request for each prompt; one for equal prompts that follow one another."""
    requests: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts):
        if requests and prompt == requests[-1].prompt_ids:
            requests[-1] = requests[-1].with_samples(requests[-1].params.n + 1)
        else:
            own = params.with_seed(*seed, index)
            requests.append(GenerationRequest(prompt, own, adapter))
    return requests


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
