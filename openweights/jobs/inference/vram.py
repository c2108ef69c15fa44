"""How much memory a model takes that answers: weights, cache, and what a forward pass makes. No
torch.

An engine's cache holds as many answers as it works on at a time, as long as they may get; where
memory is short it works on fewer, so the cache is counted up to `MOST_CACHE_GB` alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from openweights.jobs.pinning import adapter_base
from openweights.jobs.unsloth.config.vram import CONTEXT_GB, NF4_BYTES
from openweights.models.names import guessed_vram_gb, model_reference
from openweights.models.shape import ModelShape, model_shape

if TYPE_CHECKING:
    from openweights import OpenWeights

MOST_CACHE_GB = 10
AT_ONCE = 128  # answers that an engine works on
USUAL_TOKENS = 1024  # of a prompt and its answer, where nobody knows
_VALUE_BYTES = 2
_READ_TOKENS = 16_384  # of prompts, in one forward
_FORMS = 4  # in which the probabilities of a word are there at a time, in float32


def answering_vram_gb(
    ow: OpenWeights,
    model: str,
    quantization: str | None = None,
    *,
    tokens: int = AT_ONCE * USUAL_TOKENS,
    engine: str = "auto",
) -> int:
    """GPU memory, in GiB, that answers of a model need; none of OpenAI's.

    Args:
        tokens: Of prompts and answers that are worked on at a time.
    """
    if model_reference(model).kind == "openai":
        return 0
    base = adapter_base(ow, model, ask_hub=False)
    shape = model_shape(base)
    # vLLM takes what there is, and wants room for the longest row that the model can have.
    if shape is None or engine == "vllm":
        return guessed_vram_gb(base, quantization) + MOST_CACHE_GB
    in_4bit = quantization is not None or "4bit" in base.lower()
    return needed_gb(shape, tokens, in_4bit=in_4bit)


def needed_gb(shape: ModelShape, tokens: int, *, in_4bit: bool = False) -> int:
    """GPU memory of a shape, in GiB, rounded up."""
    each = NF4_BYTES if in_4bit else _VALUE_BYTES
    weights = each * shape.linear_parameters + _VALUE_BYTES * shape.other_parameters
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * _VALUE_BYTES * tokens
    width = shape.intermediate * shape.experts_per_token
    read = 3 * (width + shape.hidden) * _VALUE_BYTES * min(tokens, _READ_TOKENS)
    drawn = _FORMS * 4 * shape.vocabulary * AT_ONCE
    bytes_in_all = weights + min(cache, MOST_CACHE_GB * 2**30) + read + drawn
    return math.ceil(bytes_in_all / 2**30 + CONTEXT_GB)


def tokens_at_once(rows: int, prompt_tokens: float, answer_tokens: int, answers: int) -> int:
    """Of prompts and answers that an engine works on at a time.

    Args:
        prompt_tokens: Of all rows together.
        answer_tokens: Of an answer, at most.
        answers: To each row.
    """
    working = min(rows * answers, AT_ONCE)
    return math.ceil(working * (prompt_tokens / max(rows, 1) + answer_tokens))
