"""What a layer keeps is measured; as many keep it as fit; no number changes by it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from openweights.jobs.unsloth.runtime.recomputation import (
    affordable,
    keep_activations,
    measured,
    recomputing_layers,
)
from tests.rounding import assert_equal_in_float64


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_what_is_kept_changes_no_gradient() -> None:
    model, ids = _model(), torch.arange(24).view(2, 12)
    layers = recomputing_layers(model)
    assert len(layers) == 4
    expected = _gradients(model, ids)
    for count in (3, 1):
        keep_activations(layers, count)
        assert [layer.gradient_checkpointing for layer in layers] == [True] * (4 - count) + [
            False
        ] * count
        for found, wanted in zip(_gradients(model, ids), expected, strict=True):
            assert_equal_in_float64(found, wanted)


def test_what_a_layer_keeps_is_proportional_to_its_tokens() -> None:
    model = _model()
    (*_, last) = recomputing_layers(model)
    sizes = {}
    for length in (8, 16):
        with measured(last) as found:
            _gradients(model, torch.arange(length)[None])
            with torch.no_grad():  # as a teacher does
                model(input_ids=torch.arange(3)[None])
        sizes[length] = found["bytes"]
        assert found["tokens"] == length
    # Attention's own square of the length is 2 of 16 + ... parts here, and is not there with flash.
    hidden_states = 8 * 16 * 8  # tokens, width, bytes of a float64
    assert 8 * hidden_states < sizes[8] < 40 * hidden_states
    assert 1.9 < sizes[16] / sizes[8] < 2.6
    assert last.gradient_checkpointing and "forward" not in vars(last)


@given(
    st.integers(1, 80),
    st.floats(1, 1e6),
    st.floats(0, 1e6),
    st.floats(0, 1e12),
    st.integers(1, 100_000),
    st.floats(1e9, 2e12),
)
def test_what_is_kept_fits_and_one_more_would_not(
    layers: int, layer: float, peak: float, base: float, tokens: int, budget: float
) -> None:
    count = affordable(layers, layer, peak, base, tokens, budget)
    assert 0 <= count <= layers

    def used(kept: int) -> float:
        return base + peak * tokens + kept * layer * tokens

    assert count == 0 or used(count) <= budget * (1 + 1e-9)
    assert count == layers or used(count + 1) > budget * (1 - 1e-9)
