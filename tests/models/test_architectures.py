"""What an architecture does between its layers, beside them and behind them is not left out: scores
of rows, padded and packed, and greedy answers are those of its own code.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from openweights.errors import ConfigError
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.transformers_engine import TransformersEngine
from openweights.models.forward import logit_transform
from openweights.models.log_probs import check_logits, scored_log_probs
from openweights.models.packing import (
    WINDOW_IN_MASK,
    HiddenInputError,
    cap_attention,
    keeps_rows_apart,
    packed_attention,
)
from openweights.models.tokens import IGNORED, Collator
from tests.rounding import assert_sums_equal, terms_of
from tests.tiny_model import make_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# With few heads that choose, or where a token's embedding is 0, as that of padding, many scores are
# exactly 0, and which of their tokens are chosen is left to the sort.
CHOSEN: dict[str, Any] = {
    **EXPERTS, "pad_token_id": None,
    "index_topk": 4, "index_n_heads": 32, "index_head_dim": 16, "n_group": 1,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "topk_group": 1,
}  # fmt: skip
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 5}
# What each has of its own; whether its rows are packed.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "soft-capped scores": ("gemma2", CAPPED, True),
    "soft-capped scores, again": ("vaultgemma", CAPPED, True),
    "logits that are multiplied": ("hyperclovax", {"logits_scaling": 0.25}, True),
    "logits that are divided": ("granite", {"logits_scaling": 4.0}, True),
    "logits divided by a ratio of sizes": ("minicpm3", {**LATENT, "dim_model_base": 8}, True),
    "a factor on logits": ("cohere2", {"logit_scale": 0.25, "sliding_window": 5}, True),
    "a cap of another name": (
        "recurrent_gemma",
        {"logits_soft_cap": 3.0, "attention_window_size": 5},
        False,
    ),
    "a cap of a third name": ("xlstm", {"output_logit_soft_cap": 3.0, "num_heads": 4}, False),
    "layers of another name": (
        "llama4_text",
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
        False,
    ),
    "attention that is viewed in another shape": ("afmoe", {**EXPERTS, "sliding_window": 5}, True),
    "a window in the mask alone": (
        "qwen2_moe",
        {
            **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        },
        True,
    ),
    "a state beside the keys": ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
    "states alone": ("mamba", {"state_size": 8}, False),
    "no limit of positions": ("bloom", {"n_head": 4}, False),
    "tokens that are chosen": ("hy_v4", {**LATENT, **CHOSEN}, False),
    "tokens that are chosen, again": ("deepseek_v32", {**LATENT, **CHOSEN}, False),
    "tokens that are chosen, once more": ("glm_moe_dsa", {**LATENT, **CHOSEN}, False),
    "tokens that are summed up": (
        "deepseek_v4",
        {
            **CHOSEN, "num_key_value_heads": 1, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "head_dim": 16, "o_lora_rank": 8, "o_groups": 2, "sliding_window": 8,
        },
        False,
    ),
}  # fmt: skip
ROWS = [[5, 6, 7, 30, 31, 8, 9, 10, 11, 12], [9, 8], list(range(40, 60)), [4, 4, 4]]


def pair(kind: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """A random model with the attention that it is loaded with, and as its own code computes."""
    known = inspect.signature(type(AutoConfig.for_model(kind))).parameters
    given = {name: value for name, value in {**SMALL, **changes}.items() if name in known}
    models = []
    for attention in (None, "eager"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **given)
        config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        models.append(model.eval())
    cap_attention(models[0])
    return models[0], models[1]


def own_scores(model: Any) -> Tensor:
    """Of each row alone, from the logits of its own forward."""
    scores = []
    for row in map(torch.tensor, ROWS):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        scores.append(logits.float().log_softmax(-1).gather(-1, row[1:, None])[:, 0])
    return torch.cat(scores)


def gradients(model: Any, scores: Tensor) -> list[Tensor]:
    model.zero_grad()
    scores.square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_scored_and_learned_as_by_the_models_own_code(name: str) -> None:
    kind, changes, is_packed = MODELS[name]
    model, plain = pair(kind, changes)
    check_logits(model, kind)
    expected = own_scores(plain)
    wanted = gradients(plain, expected)
    size = max(float(gradient.abs().max()) for gradient in wanted)
    terms = 4 * terms_of(model, sum(map(len, ROWS)))

    def compare(packed: bool) -> None:
        rows = [{"input_ids": row, "labels": row} for row in ROWS]
        batch = Collator(0, packed=packed)(rows)
        scores = scored_log_probs(model, batch, batch["labels"] != IGNORED)
        assert_sums_equal(scores, expected, terms)
        for found, gradient in zip(gradients(model, scores), wanted, strict=True):
            assert_sums_equal(found, gradient, terms, size=size * terms)

    compare(packed=False)
    assert keeps_rows_apart(model, [{"input_ids": row} for row in ROWS]) == is_packed
    compare(packed=is_packed)


FAILING = ("xlstm", "recurrent_gemma")  # where their own code keeps a state in a cache
GREEDY = [name for name, (kind, _, _) in MODELS.items() if kind not in FAILING]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_answers_are_those_of_the_models_own_code(name: str) -> None:
    """Row by row, without a cache; some leave the batch while others grow."""
    kind, changes, _ = MODELS[name]
    model, plain = pair(kind, changes)
    engine = TransformersEngine(model, make_tokenizer())
    counts = (8, 3, 9, 5)
    params = [
        SamplingParams(temperature=0, max_new_tokens=count, stop_token_ids=(), detokenize=False)
        for count in counts
    ]
    requests = [
        GenerationRequest(tuple(row), own, None) for row, own in zip(ROWS, params, strict=True)
    ]
    for row, count, own in zip(ROWS, counts, engine.generate(requests), strict=True):
        ids = list(row)
        for _ in range(count):
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert list(own[0].token_ids) == ids[len(row) :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_half_precision_is_loaded_as_in_float32(name: str, dtype: torch.dtype) -> None:
    """Mamba's last hidden states are in float32 whatever its weights are in."""
    kind, changes, _ = MODELS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pair(kind, changes)[0].to(device, dtype)
    check_logits(model, "org/name")
    if kind not in FAILING:
        TransformersEngine(model, make_tokenizer())
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    batch = {key: value.to(device) for key, value in Collator(0)(rows).items()}
    scores = scored_log_probs(model, batch, batch["labels"] != IGNORED)
    assert bool(scores.isfinite().all())


def test_rows_that_an_architecture_confuses_are_answered_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The control: where they are kept apart, nothing is said."""
    TransformersEngine(pair("bloom", {"n_head": 4})[0], make_tokenizer())
    assert not caplog.records
    # Positions are counted from the left end of the batch, padding included.
    changes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "init_std": 0.3}
    model, plain = pair("bart", changes)
    engine = TransformersEngine(model, make_tokenizer())
    assert "a BartForCausalLM answers rows of one batch otherwise" in caplog.text
    params = SamplingParams(temperature=0, max_new_tokens=4, stop_token_ids=(), detokenize=False)
    found = engine.generate([GenerationRequest(tuple(row), params, None) for row in ROWS])
    for row, own in zip(ROWS, found, strict=True):
        logits = plain(input_ids=torch.tensor([[*row, *own[0].token_ids]])).logits[0]
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == own[0].token_ids


@pytest.mark.parametrize("kind", FAILING)
def test_an_architecture_that_cannot_answer_is_refused_when_it_is_loaded(kind: str) -> None:
    name = next(name for name, (own, _, _) in MODELS.items() if own == kind)
    with pytest.raises(ConfigError, match="whose answers with a cache are not"):
        TransformersEngine(pair(kind, MODELS[name][1])[0], make_tokenizer())


def test_an_architecture_that_sees_padding_is_refused() -> None:
    """Without padding its own code leaves out the mask, and rows see what comes later."""
    model, _ = pair("doge", {})
    with pytest.raises(ConfigError, match="DogeForCausalLM, which scores rows that are padded"):
        check_logits(model, "org/name")


def test_weights_that_are_no_numbers_are_refused() -> None:
    model, _ = pair("llama", {})
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="its weights are broken"):
        check_logits(model, "org/name")


def test_a_head_that_does_more_is_refused() -> None:
    model, _ = pair("modernbert-decoder", {})
    with pytest.raises(ConfigError, match="ModernBertDecoderForCausalLM, whose logits"):
        check_logits(model, "org/name")
    model, _ = pair("llama", {})
    check_logits(model, "the control")
    model.config.final_logit_softcapping = 1.0
    assert logit_transform(model) == (1.0, 1.0)
    with pytest.raises(ConfigError):
        check_logits(model, "org/name")


def test_windows_that_attention_is_not_told_of_are_known() -> None:
    """Of every language model that transformers has."""
    silent = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text()
        masks = re.search("create_(sliding_window|chunked)_causal_mask", text)
        if masks and "ForCausalLM(" in text and "sliding_window=" not in text:
            silent.add(file.parent.name)
    assert silent == {kind.removesuffix("_text") for kind in WINDOW_IN_MASK}


def test_biases_of_packed_rows_are_not_left_out() -> None:
    """A mask, biases or choices beside the borders: the model is not packed, rather than wrong."""
    query, starts = torch.randn(1, 4, 6, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    module = torch.nn.Module()
    inputs: list[dict[str, Any]]
    inputs = [{"position_bias": torch.zeros(1, 4, 6, 6)}, {"indices": torch.zeros(1, 6, 2)}]
    for more in inputs:
        with pytest.raises(HiddenInputError):
            packed_attention(module, query, query, query, None, cu_seq_lens_q=starts, **more)
