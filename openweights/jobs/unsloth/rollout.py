"""Sampling completions from the student while it trains: the on-policy half of self-distillation.

An engine takes all prompts of one optimizer step and returns one completion each. Sampling is a
function of the weights, the prompts and the seed alone: the generator's state outside is untouched,
so a resumed run samples what the uninterrupted one would have.
"""

from __future__ import annotations

from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
)

from openweights.generation.params import SamplingParams
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.tokens import eos_token_ids


def sampling_params(
    config: TrainingConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> SamplingParams:
    """Sampling as configured; every end token of model and tokenizer ends a completion."""
    return SamplingParams(
        max_new_tokens=config.sdft_max_new_tokens,
        temperature=config.sdft_temperature,
        top_p=config.sdft_top_p,
        stop_token_ids=tuple(eos_token_ids(base_model(model), tokenizer)),
    )
