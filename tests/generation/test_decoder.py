"""The fused decoder against transformers' own forward, and its kernels against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from openweights.errors import ConfigError
from openweights.generation.choose import rollout_engine
from openweights.generation.cuda.decode_kernels import torch_ops
from openweights.generation.cuda.decoder import KVCache, LlamaDecoder, UnsupportedModelError
from openweights.generation.transformers_engine import TransformersRollout

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [3] * 9]
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def make_model(
    config_class: Any, modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"), **changes: Any
) -> Any:
    """A random model with adapters that do something, and norms and biases that are not trivial."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "sliding_window": None,
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


@torch.no_grad()
def logits_after(base: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([base(torch.tensor([row])).logits[0, -1] for row in rows])


@torch.no_grad()
def check_against(base: Any, decoder: LlamaDecoder) -> None:
    """Prefill of prompts of other lengths, then steps, each row against its own plain forward."""
    rows = [list(prompt) for prompt in PROMPTS]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    decoder.prepare(32)
    cache = KVCache(decoder, len(rows) + 1, 32)
    cache.keys.fill_(1e4)  # poison: what was not written must not be read
    cache.values.fill_(1e4)
    logits = decoder.prefill(ids, lengths, cache, 0)
    torch.testing.assert_close(logits, logits_after(base, rows), rtol=1e-4, atol=1e-4)
    for _ in range(5):
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        logits = decoder.step(tokens, lengths, cache)
        lengths += 1
        torch.testing.assert_close(logits, logits_after(base, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_equals_the_models_own_forward(name: str) -> None:
    model = make_model(CONFIGS[name])
    base = model.get_base_model()
    before = logits_after(base, PROMPTS)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    decoder = LlamaDecoder(base, torch_ops)
    assert torch.equal(logits_after(base, PROMPTS), before), "sharing storage changes no value"
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    check_against(base, decoder)
    perturb(model)
    decoder.refresh()
    check_against(base, decoder)


def test_projections_share_one_weight() -> None:
    model = make_model(Qwen2Config)
    base = model.get_base_model()
    attention = base.model.layers[0].self_attn
    LlamaDecoder(base, torch_ops)
    q, k = attention.q_proj.base_layer.weight, attention.k_proj.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("config", "changes", "modules", "named"),
    [
        (Gemma2Config, {}, ("q_proj",), "architecture gemma2"),
        (LlamaConfig, {"hidden_act": "gelu"}, ("q_proj",), "activation"),
        (MistralConfig, {"sliding_window": 64}, ("q_proj",), "sliding-window"),
        (LlamaConfig, {}, ("q_proj", "lm_head"), "output head"),
    ],
)
def test_what_it_cannot_compute_is_refused_or_left_to_transformers(
    config: Any, changes: dict[str, Any], modules: tuple[str, ...], named: str
) -> None:
    model = make_model(config, modules, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        LlamaDecoder(model.get_base_model(), torch_ops)
    assert isinstance(rollout_engine("auto", model, 0), TransformersRollout)
    with pytest.raises(ConfigError, match="sdft_rollout_engine"):
        rollout_engine("cuda_graph", model, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(4, 7, 128), (2, 2, 64), (8, 4, 32), (2, 1, 256)]
)
def test_attention_kernel(
    dtype: torch.dtype, tolerance: float, has_norm: bool, kv_heads: int, group: int, dim: int
) -> None:
    from openweights.generation.cuda import triton_ops

    span, rows = 130, 6
    random = {"device": "cuda", "dtype": dtype}
    qkv = torch.randn(rows, (group + 2) * kv_heads * dim, **random)
    positions = torch.tensor([0, 1, 63, 64, 65, span - 1], device="cuda")
    cos, sin = torch.randn(2, span, dim, device="cuda")
    cache = torch.randn(2, rows, kv_heads, span, dim, **random)
    # Poison: what lies behind a row's position must not be read.
    behind = torch.arange(span, device="cuda")[None] >= positions[:, None]
    cache.masked_fill_(behind[None, :, None, :, None], 3e4)
    norms = torch.randn(2, dim, **random) if has_norm else (None, None)
    plain, fast = cache.clone(), cache.clone()
    expected = torch_ops.rope_attend(qkv, cos, sin, positions, *plain, *norms, 1e-6)
    actual = triton_ops.rope_attend(qkv, cos, sin, positions, *fast, *norms, 1e-6)
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert (fast - plain).norm() <= tolerance * plain.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 3584), (33, 1000)])
def test_elementwise_kernels(dtype: torch.dtype, rows: int, size: int) -> None:
    from openweights.generation.cuda import triton_ops

    x, residual = torch.randn(2, rows, size, device="cuda", dtype=dtype)
    weight, sums = (
        torch.randn(size, device="cuda", dtype=dtype),
        [residual.clone(), residual.clone()],
    )
    expected = torch_ops.add_rms_norm(x, sums[0], weight, 1e-6)
    torch.testing.assert_close(triton_ops.add_rms_norm(x, sums[1], weight, 1e-6), expected)
    assert torch.equal(*sums)
    gate_up = torch.randn(rows, 2 * size, device="cuda", dtype=dtype)
    torch.testing.assert_close(triton_ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up))
