"""Adapters of every kind and of any name: in one batch each answers as it does alone, and one that
cannot be loaded leaves nothing behind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from openweights.errors import ConfigError
from openweights.generation.choose import generation_engine
from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.generation.transformers_engine import TransformersEngine
from openweights.models.adapters import not_plain
from tests.tiny_model import make_tokenizer

QV = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "org/plain-1.5": {"target_modules": QV},
    "wide": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "target_modules": ["down_proj", "o_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}, "target_modules": QV},
    "last.layer": {"layers_to_transform": [1], "target_modules": QV},
    "dora": {"use_dora": True, "target_modules": QV},
    "lora_bias": {"lora_bias": True, "target_modules": QV},
    "bias": {"bias": "all", "target_modules": QV},
    "bias2": {"bias": "lora_only", "target_modules": QV},
    "head": {"modules_to_save": ["lm_head"], "target_modules": QV},
    "words": {"trainable_token_indices": [5, 40], "target_modules": QV},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
PLAIN = list(KINDS)[:5]
TOGETHER = [name for name in KINDS if name != "words"]
PROMPTS = [[10, 11, 12], [40, 5], [7, 8, 9, 10, 11, 12, 13]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=6, stop_token_ids=())
ENGINES = {"transformers": TransformersEngine, "cuda_graph": CudaGraphEngine}


def base(layers: int = 2, size: int = 32) -> Any:
    """Qwen 2, whose layers have biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


def write(folder: Path, model: Any, given: dict[str, Any]) -> Path:
    """An adapter whose every weight has been moved."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, **given}))
    torch.manual_seed(len(str(given)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write(root / str(number), base(), given)
        for number, (name, given) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Any:
    """What an adapter answers by itself, by forwards without cache and without an engine."""

    @cache
    @torch.no_grad()
    def answers(name: str | None) -> list[list[int]]:
        model = base() if name is None else PeftModel.from_pretrained(base(), folders[name])
        told = []
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(6):
                logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            told.append(ids[len(prompt) :])
        return told

    return answers


def answers(engine: GenerationEngine, names: list[str | None]) -> list[list[list[int]]]:
    """Of each name the answers to all prompts, in one batch."""
    requests = [GenerationRequest(p, GREEDY, name) for p in PROMPTS for name in names]
    found = iter([own[0].token_ids for own in engine.generate(requests)])
    told: list[list[list[int]]] = [[] for _ in names]
    for _ in PROMPTS:
        for own in told:
            own.append(next(found))
    return told


def test_every_kind_changes_what_is_answered(alone: Any) -> None:
    """The control of the others."""
    assert all(alone(name) != alone(None) for name in KINDS)


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.sampled_from(TOGETHER), min_size=2, max_size=5, unique=True))
def test_adapters_of_all_kinds_answer_in_one_batch_as_each_alone(
    folders: dict[str, Path], alone: Any, names: list[str]
) -> None:
    engine = TransformersEngine(base(), make_tokenizer())
    for name in names:
        engine.set_adapter(name, folders[name])
    asked = [None, *names, None]
    assert answers(engine, asked) == [alone(name) for name in asked]
    engine.remove_adapter(names[0])
    assert answers(engine, asked[2:]) == [alone(name) for name in asked[2:]]
    for name in names[1:]:
        engine.remove_adapter(name)
    assert engine.adapters == () and answers(engine, [None]) == [alone(None)]


def test_trained_tokens_answer_alone(folders: dict[str, Path], alone: Any) -> None:
    engine = TransformersEngine(base(), make_tokenizer())
    engine.set_adapter("words", folders["words"])
    with pytest.raises(ConfigError, match="no other beside one with trainable_token_indices"):
        engine.set_adapter("wide", folders["wide"])
    assert answers(engine, ["words", None]) == [alone("words"), alone(None)]
    engine.set_adapter("words", folders["words"])
    engine.remove_adapter("words")
    assert answers(engine, [None]) == [alone(None)]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in PLAIN])
def test_cuda_graph_refuses_what_it_cannot_compute_and_goes_on(
    folders: dict[str, Path], alone: Any, name: str
) -> None:
    assert not_plain(folders[name]) is not None or name == "embedding"
    engine = CudaGraphEngine(base(), make_tokenizer())
    engine.set_adapter(PLAIN[0], folders[PLAIN[0]])
    with pytest.raises(ConfigError, match=f"adapter '{name}': "):
        engine.set_adapter(name, folders[name])
    assert engine.adapters == (PLAIN[0],)
    engine.set_adapter("wide", folders["wide"])
    asked = ["wide", None, PLAIN[0]]
    assert answers(engine, asked) == [alone(given) for given in asked]


def test_cuda_graph_answers_for_plain_ones_of_any_name(
    folders: dict[str, Path], alone: Any
) -> None:
    engine = CudaGraphEngine(base(), make_tokenizer())
    for name in PLAIN:
        assert not_plain(folders[name]) is None
        engine.set_adapter(name, folders[name])
    assert answers(engine, [*PLAIN, None]) == [alone(name) for name in [*PLAIN, None]]


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_that_does_not_fit_leaves_nothing_behind(
    engine_name: str, is_first: bool, folders: dict[str, Path], alone: Any, tmp_path: Path
) -> None:
    prompts = get_peft_model(
        base(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    prompts.save_pretrained(str(tmp_path / "prompts"))
    broken = write(tmp_path / "broken", base(), KINDS["wide"])
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    wrong = {
        tmp_path / "prompts": "PROMPT_TUNING",
        broken: "cannot be loaded",
        tmp_path / "nothing": "cannot be loaded",
        write(tmp_path / "wider", base(size=64), KINDS["wide"]): "size mismatch",
        write(tmp_path / "deeper", base(3), KINDS["wide"]): "holds layers that the model lacks",
        write(tmp_path / "shallower", base(1), KINDS[PLAIN[0]]): "lacks layers of the model",
    }
    engine = ENGINES[engine_name](base(), make_tokenizer())
    names = [] if is_first else [PLAIN[0]]
    for name in names:
        engine.set_adapter(name, folders[name])
    for folder, says in wrong.items():
        with pytest.raises(ConfigError, match=f"adapter 'new': .*{says}"):
            engine.set_adapter("new", folder)
        assert engine.adapters == tuple(names)
        assert answers(engine, [None, *names]) == [alone(name) for name in [None, *names]]
    engine.set_adapter("new", folders["wide"])
    assert answers(engine, ["new", None, *names]) == [
        alone(name) for name in ["wide", None, *names]
    ]


def test_an_engine_that_is_chosen_knows_its_adapters(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="cannot compute this model .an adapter with use_dora"):
        generation_engine("cuda_graph", base(), make_tokenizer(), adapters=[folders["dora"]])
    chosen = generation_engine("auto", base(), make_tokenizer(), adapters=[folders["dora"]])
    assert chosen.name == "transformers"
