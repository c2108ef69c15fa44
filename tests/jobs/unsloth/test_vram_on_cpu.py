"""The estimate of a job's memory against the tensors of whole steps, counted one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from openweights.errors import ConfigurationError
from openweights.jobs.unsloth.config.vram import CPU, Tokens, trained_parameters, vram_needed
from openweights.jobs.unsloth.grpo_ft import grpo_train
from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.runtime.memory import out_of_memory_explained, refuse_what_cannot_fit
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.load import load_model
from openweights.models.shape import ModelShape, model_shape
from tests.memory_meter import MemoryMeter
from tests.tiny_model import make_tokenizer

WITHIN = 0.1
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 30,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A model's shape, a job's parameters, and tokens of an answer."""

    shape: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    answer: int = 120
    rows: int = 4


SDFT = {"loss": "sdft", "sdft_gate": "off", "sdft_demo_placement": "template"}
GRPO = {"loss": "grpo", "grpo_num_generations": 4, "grpo_reward_function": "ngram_match"}
CASES = {
    "sft": Case(),
    "sft, long rows": Case(answer=400, rows=2),
    "sft, one row": Case(job={"gradient_accumulation_steps": 3}, rows=1),
    "sft, accumulated": Case(job={"gradient_accumulation_steps": 3}, rows=2),
    "sft, padded": Case(job={"packing": False}),
    "sft, r 64": Case(job={"r": 64}),
    "sft, two targets": Case(job={"target_modules": ["q_proj", "v_proj"]}),
    "sft, dropout": Case(job={"lora_dropout": 0.1}),
    "sft, sgd": Case(job={"optim": "sgd"}),
    "sft, as many heads of keys": Case({"num_key_value_heads": 4}),
    "sft, wide MLP": Case({"intermediate_size": 512}),
    "sft, wide": Case({"hidden_size": 256, "num_hidden_layers": 2}),
    "sft, many words": Case({"vocab_size": 8_000}),
    "sdft": Case(job=SDFT | {"sdft_max_new_tokens": 24}),
    "sdft, forward": Case(job=SDFT | {"sdft_max_new_tokens": 48, "sdft_divergence": "forward_kl"}),
    "sdft, many words": Case(
        {"vocab_size": 4_000},
        SDFT | {"sdft_max_new_tokens": 48, "sdft_divergence": "jsd"},
    ),
    "sft, all weights": Case(job={"is_peft": False}),
    "sdft, all weights": Case(job=SDFT | {"sdft_max_new_tokens": 24, "is_peft": False}),
    "grpo": Case(job=GRPO | {"grpo_max_completion_length": 24}),
    "grpo, many words": Case({"vocab_size": 4_000}, GRPO | {"grpo_max_completion_length": 96}),
    "dpo": Case(job={"loss": "dpo"}),
    "orpo": Case(job={"loss": "orpo"}),
    "SmolLM2, sft": Case(SMOLLM2, {"r": 32}),
    "SmolLM2, sdft": Case(SMOLLM2, SDFT | {"sdft_max_new_tokens": 24}),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow if "SmolLM2" in name else ()) for name in CASES]


def make_model(folder: Path, shape: dict[str, Any]) -> ModelShape:
    tokenizer = make_tokenizer(320)
    torch.manual_seed(0)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlamaConfig(
        **{**SMALL, **shape}, max_position_embeddings=2_048, eos_token_id=end, pad_token_id=pad
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = model_shape(str(folder))
    assert found is not None and found.parameters == sum(p.numel() for p in model.parameters())
    return found


def config_of(case: Case, folder: Path) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    values = {
        "model": str(folder),
        "training_file": str(data),
        "loss": "sft",
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "max_seq_length": 1_024,
        "optim": "adamw_torch",
        "output_dir": str(folder / "out"),
        "engine": "transformers",
    }
    return TrainingConfig(**{**values, **case.job})


def train(case: Case, config: TrainingConfig, model: Any, tokenizer: Any) -> None:
    """Two steps of rows that are all equally long, but for some characters of the first."""
    user = {"role": "user", "content": "Go"}
    answers = [{"role": "assistant", "content": "z" * (case.answer - 1 - 4 * (i == 0))}
               for i in range(2 * config.step_size)]  # fmt: skip
    if config.loss in ("dpo", "orpo"):
        worse = {"role": "assistant", "content": "y" * (case.answer - 1)}
        pairs = [{"prompt": [user], "chosen": [a], "rejected": [worse]} for a in answers]
        preference_train(config, model, tokenizer, pairs, None)
        return
    rows = [{"messages": [user, answer]} for answer in answers]
    if config.loss == "grpo":
        grpo_train(
            config, model, tokenizer, rows, None,
            fetch=lambda file, target: Path(file), log_event=lambda event: None,
        )  # fmt: skip
        return
    (sft_train if config.loss == "sft" else sdft_train)(config, model, tokenizer, rows, None)


def largest_batches(model: Any) -> dict[str, int]:
    """Filled in as the model computes: tokens of its largest forward passes, by their kind."""
    found = {"micro": 0, "teacher": 0, "cached": 0}

    def note(_: Any, args: Any, given: dict[str, Any]) -> None:
        kind = "cached" if given.get("use_cache") else "teacher"
        kind = "micro" if torch.is_grad_enabled() else kind
        found[kind] = max(found[kind], given["input_ids"].numel())

    decoder = base_model(model).get_decoder()
    decoder.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_what_the_tensors_take(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    shape, config = make_model(tmp_path, case.shape), config_of(case, tmp_path)
    model, tokenizer = load_model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(config, shape) == trained
    found = largest_batches(model)
    with MemoryMeter(model) as meter:
        train(case, config, model, tokenizer)
    # Packed, the rows of a step are one micro-batch, and so are the two answers of a pair.
    rows = config.step_size if config.packing and config.loss == "sft" else case.rows
    sampled = {"sdft": config.sdft_max_new_tokens, "grpo": config.grpo_max_completion_length}
    answers = sampled.get(config.loss, case.answer)
    scored = rows * answers * (2 if config.loss in ("dpo", "orpo") else 1)
    tokens = Tokens(scored=scored, **found)
    estimate = vram_needed(config, shape, device=CPU, tokens=tokens)
    assert estimate.total == pytest.approx(meter.peak, rel=WITHIN), f"{estimate}, {tokens}"
    # The control: a layer more or less is another figure, where layers are what takes memory.
    if shape.vocabulary == SMALL["vocab_size"]:
        other = make_model(tmp_path, {**case.shape, "num_hidden_layers": 2 * shape.layers})
        more = vram_needed(config, other, device=CPU, tokens=tokens)
        assert more.total != pytest.approx(meter.peak, rel=WITHIN)


def test_a_training_that_cannot_fit_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    make_model(tmp_path, {})
    config = config_of(Case(), tmp_path)
    refuse_what_cannot_fit(config, lambda: (0, 2**30))
    with pytest.raises(ConfigurationError, match=r"takes 0\.0 GiB .*at least, and .* has 0\.0 GiB"):
        refuse_what_cannot_fit(config, lambda: (0, 2**20))
    small = make_model(tmp_path, SMOLLM2 | {"num_hidden_layers": 1})
    whole = config.model_copy(update={"is_peft": False})
    room = 8 * small.parameters  # for weights in float32 and their gradients, but no optimizer
    refuse_what_cannot_fit(config, lambda: (0, room))
    with pytest.raises(ConfigurationError, match=r"optimizer 0\.2.*or train a LoRA"):
        refuse_what_cannot_fit(whole, lambda: (0, room))


def test_a_full_memory_names_the_two_settings_to_lower(tmp_path: Path) -> None:
    make_model(tmp_path, {})
    config = config_of(Case(), tmp_path)
    expected = r"lower per_device_train_batch_size \(it is 4\) or max_seq_length \(it is 1024\)"
    with pytest.raises(ConfigurationError, match=expected), out_of_memory_explained(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    unknown = out_of_memory_explained(config.model_copy(update={"model": "org/nameless"}))
    with pytest.raises(ConfigurationError, match="lower per_device_train_batch_size"), unknown:
        raise torch.OutOfMemoryError("CUDA out of memory")
