"""The decoder, eagerly on the CPU: greedy completions equal those of transformers' `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from openweights.generation.cuda import torch_ops
from openweights.generation.cuda.decoder import Decoder
from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.cuda.linear import UnsupportedModelError
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.models.tokens import pad_left

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [3] * 9, [5, 6, 7, 8, 9, 12, 13], [1], [*range(20, 60)]]
ATTENTION = ("q_proj", "v_proj", "o_proj")
EVERYWHERE = (*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=(), detokenize=False)
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "llama": (LlamaConfig, {}, EVERYWHERE),
    "llama with scaled rotary": (LlamaConfig, {"rope_parameters": LLAMA_3}, ATTENTION),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}, ATTENTION),
    "llama with tied head": (LlamaConfig, {"tie_word_embeddings": True}, ("down_proj",)),
    "llama with an adapter on its head": (LlamaConfig, {}, ("q_proj", "lm_head")),
    "mistral with a window": (MistralConfig, {"sliding_window": 7}, EVERYWHERE),
    "mistral": (MistralConfig, {"sliding_window": None}, ATTENTION),
    "qwen2": (Qwen2Config, {}, EVERYWHERE),
    "qwen2 with windows": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        ATTENTION,
    ),
    "qwen3": (Qwen3Config, {}, EVERYWHERE),
    "qwen3 with experts": (
        Qwen3MoeConfig,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 2,
        },
        ATTENTION,
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 48,
            "layer_types": MIXED,
            "tie_word_embeddings": False,
        },
        EVERYWHERE,
    ),
}


def make_model(config_class: Any, modules: tuple[str, ...], **changes: Any) -> Any:
    """A random model with an adapter that does something, and norms and biases that do, too."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: Any = AutoModelForCausalLM.from_config(config_class(**{**values, **changes}))
    lora = LoraConfig(r=3, lora_alpha=8, target_modules=list(modules))
    model = get_peft_model(model, lora).eval()
    perturb(model)
    return model


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "bias" in name or "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def generated(model: Any) -> list[list[int]]:
    """What `generate` of transformers answers greedily."""
    ids, mask = pad_left(PROMPTS, 0, torch.device("cpu"))
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return output[:, ids.shape[1] :].tolist()


def completed(
    engine: CudaGraphEngine, adapter: str | None = "default", params: SamplingParams = GREEDY
) -> list[list[int]]:
    found = engine.generate([GenerationRequest(prompt, params, adapter) for prompt in PROMPTS])
    return [own[0].token_ids for own in found]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_completions_equal_those_of_generate(name: str) -> None:
    """Fewer rows than prompts, and pages of a few tokens: rows change hands."""
    config, changes, modules = ARCHITECTURES[name]
    model = make_model(config, modules, **changes)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = CudaGraphEngine(model, None, rows=4, page_size=4)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    found = completed(engine)
    assert found == generated(model)
    assert len({token for tokens in found for token in tokens}) > 10, "they say something"
    perturb(model)
    assert completed(engine) == generated(model)
    with model.disable_adapter():
        base = generated(model)
    assert completed(engine, None) == base


def test_projections_over_one_input_share_a_weight_with_their_adapters() -> None:
    model = make_model(Qwen2Config, ATTENTION)
    CudaGraphEngine(model, None)
    attention = model.get_base_model().model.layers[0].self_attn
    storages = {
        weight.untyped_storage().data_ptr()
        for weight in (
            attention.q_proj.base_layer.weight,
            attention.k_proj.weight,
            attention.v_proj.base_layer.weight,
        )
    }
    assert len(storages) == 1


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_four_bit_bases(compute_dtype: torch.dtype) -> None:
    """Weights of bitsandbytes stay packed, with the adapters beside them."""
    pytest.importorskip("bitsandbytes")
    model = make_model(LlamaConfig, EVERYWHERE)
    pack(model.get_base_model(), compute_dtype)
    found = completed(CudaGraphEngine(model, None, rows=4, page_size=4))
    exact = make_model(LlamaConfig, EVERYWHERE)
    pack(exact.get_base_model(), torch.float32)
    for prompt, own, other in zip(PROMPTS, found, generated(model), strict=True):
        if own != other:
            assert compute_dtype != torch.float32, "no rounding to speak of"
            assert is_tie(model, exact, prompt, own, other)


@torch.no_grad()
def is_tie(model: Any, exact: Any, prompt: list[int], own: list[int], other: list[int]) -> bool:
    """Whether the tokens differ by less than the errors of two computations in bfloat16.

    Args:
        exact: The same weights in float32, which say how far `generate` itself is off.
    """
    at = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
    ids = torch.tensor([prompt + own[:at]], device=model.device)
    rounded, logits = (m(ids).logits[0, -1].double() for m in (model, exact))
    error = max(float((rounded - logits).abs().max()), 2**-8 * float(logits.abs().max()))
    return abs(float(logits[own[at]] - logits[other[at]])) <= 3 * error


def pack(base: Any, compute_dtype: torch.dtype) -> None:
    """Quantise the layers' weights to nf4, as bitsandbytes does when it loads a model."""
    import bitsandbytes as bnb

    for layer in base.model.layers:
        for child in [*layer.self_attn.children(), *layer.mlp.children()]:
            linear = getattr(child, "base_layer", None)
            if linear is None:
                continue
            weight = linear.weight.data
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=compute_dtype,
                quant_type="nf4",
            )
            packed.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
            child.base_layer = packed.to(weight.device)


def _dora(model: Any) -> None:
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))


def _whole_layers(model: Any) -> None:
    model.add_adapter("whole", LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))


def _experts(model: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model.add_adapter("experts", config)


@pytest.mark.parametrize(
    ("config", "changes", "change", "named"),
    [
        (Gemma2Config, {}, None, "architecture gemma2"),
        (LlamaConfig, {"hidden_act": "relu"}, None, "activation relu"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            None,
            "rotary embedding dynamic",
        ),
        (LlamaConfig, {}, _dora, "adapter dora: DoRA"),
        (LlamaConfig, {}, _whole_layers, "layers that are trained whole"),
        (Qwen3MoeConfig, {"num_experts": 4}, _experts, "adapters on experts"),
    ],
)
def test_what_it_cannot_compute_is_refused_in_words(
    config: Any, changes: dict[str, Any], change: Any, named: str
) -> None:
    model = make_model(config, ATTENTION, **changes)
    if change:
        change(model)
    with pytest.raises(UnsupportedModelError, match=named):
        Decoder(model.get_base_model(), tuple(model.peft_config), torch_ops)


def test_fp8_copies_multiply_nearly_as_the_weights_do() -> None:
    """Rounding to 3 bits of mantissa: the log-probabilities move, by little."""
    model = make_model(LlamaConfig, EVERYWHERE)
    params = SamplingParams(
        temperature=0, max_new_tokens=8, stop_token_ids=(), detokenize=False, logprobs=True
    )
    exact, narrow = (
        CudaGraphEngine(model, None, precision=precision).generate(
            [GenerationRequest(prompt, params, "default") for prompt in PROMPTS]
        )
        for precision in ("model", "fp8")
    )
    first = [(a[0].logprobs[0], b[0].logprobs[0]) for a, b in zip(exact, narrow, strict=True)]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in first), "prompts are computed exactly"
    second = [abs(a[0].logprobs[1] - b[0].logprobs[1]) for a, b in zip(exact, narrow, strict=True)]
    assert 1e-4 < max(second) < 1.0
