"""Whether an engine's answers are those of the model's own forward: rows that begin and end at
different places, each compared with the row alone, without cache and padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openweights.generation.engine import GenerationEngine
from openweights.generation.params import Completion, GenerationRequest, SamplingParams
from openweights.models.forward import HALF, active_adapter, base_model, evaluating

# Architectures whose answers the tests compare; every other one is compared when it is loaded.
KNOWN = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3")
_PROMPTS = (11, 3, 6)  # tokens of each
_NEW_TOKENS = (2, 3, 5)  # a row leaves the batch before the others
# How far log-probabilities of an answer may be from the row's own, in nats: the largest distance in
# float32; in half precision, where rounding may choose another expert, the mean one.
_LARGEST, _MEAN_IN_HALF = 2e-3, 0.3


def answers_are_own(engine: GenerationEngine, model: nn.Module) -> bool:
    """Whether three short prompts are answered as the model would answer each alone.

    False, too, where it fails at rows in one batch; the engine's own state is not cleared then.
    """
    adapter = active_adapter(model)
    requests = [
        GenerationRequest(_prompt(engine, length), _params(count), adapter)
        for length, count in zip(_PROMPTS, _NEW_TOKENS, strict=True)
    ]
    try:
        found = [own[0] for own in engine.generate(requests)]
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    distances = torch.cat(
        [_distance(model, r.prompt_ids, own) for r, own in zip(requests, found, strict=True)]
    )
    if any(p.dtype in HALF for p in model.parameters()):
        return float(distances.mean()) <= _MEAN_IN_HALF
    return float(distances.max()) <= _LARGEST


def _prompt(engine: Any, length: int) -> list[int]:
    """Words of the model, others for each length."""
    return [(3 + 7 * length + 2 * place) % engine.vocabulary for place in range(length)]


def _params(count: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_new_tokens=count, stop_token_ids=(), logprobs=True, detokenize=False
    )


def _distance(model: nn.Module, prompt: Any, answer: Completion) -> Tensor:
    """Of each token's log-probability from that in one forward of the row alone; not a number
    counts as far.
    """
    base = base_model(model)
    ids = torch.tensor([*prompt, *answer.token_ids], device=base.device)
    with evaluating(model):
        logits = base(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    own = logits.float().log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
    return (own.cpu() - torch.tensor(answer.logprobs)).abs().nan_to_num(torch.inf)
