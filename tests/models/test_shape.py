"""The shape of a model, as its config or its name tells it, is that of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from openweights.models.shape import ModelShape, model_shape, shape_of, usual_shape

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, head_dim=8),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "moe": Qwen3MoeConfig(
        **SMALL, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "gpt2": GPT2Config(vocab_size=100, n_embd=16, n_layer=3, n_head=4, n_positions=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_tells_how_many_weights_there_are(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    CONFIGS[name].save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape is not None
    # Biases, norms within a layer, routers and learned positions are a few in a hundred.
    few = 0.05 if name in ("llama", "tied") else 0.3
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=few)
    if name in ("llama", "tied"):
        assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.experts, shape.experts_per_token) == ((4, 2) if name == "moe" else (1, 1))
    assert shape.is_gated == (name != "gpt2")


def test_a_config_of_several_parts_is_that_of_its_texts() -> None:
    nested = {"model_type": "vlm", "text_config": CONFIGS["qwen2"].to_dict()}
    assert shape_of(nested) == shape_of(CONFIGS["qwen2"].to_dict())


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 16}'])
def test_a_config_that_tells_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert model_shape(str(tmp_path)) is None


def test_a_name_tells_a_usual_shape() -> None:
    assert model_shape("org/nameless") is None and model_shape("./not-there") is None
    shape = model_shape("Qwen/Qwen2.5-7B-Instruct")
    assert shape is not None and shape.parameters == pytest.approx(7.6e9, rel=0.01)
    for billions in (0.2, 0.6, 1.0, 2.0, 4.0, 10.0, 24.0, 120.0):
        assert usual_shape(billions).parameters == pytest.approx(billions * 1e9, rel=0.1)


def test_a_config_comes_before_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "model-70B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["qwen2"].to_dict()))
    shape = model_shape(str(folder))
    assert isinstance(shape, ModelShape) and shape.hidden == SMALL["hidden_size"]
