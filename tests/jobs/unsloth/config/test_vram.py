"""The estimate of a job's memory, against peaks that were measured on GPUs, and where it is used.

The peaks are those of `tests/benchmarks/RESULTS.md`; `test_vram_on_cpu.py` counts tensors itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from openweights import OpenWeights
from openweights.jobs.unsloth import FineTuning
from openweights.jobs.unsloth.config.vram import (
    CONTEXT_GB,
    CPU,
    GPU,
    Tokens,
    gpu_gb,
    most_tokens,
    must_spread,
    settings_to_lower,
    trained_parameters,
    vram_needed,
)
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.shape import ModelShape, shape_of, usual_shape
from openweights.settings import Settings
from tests.jobs.unsloth.malformed_configs import GOOD

QWEN_7B = ModelShape(152_064, 3_584, 18_944, 28, 28, 4, 128)
WITHIN = 0.1


def config(loss: str = "sft", **changes: Any) -> TrainingConfig:
    values = {"loss": loss, "r": 32, "optim": "adamw_torch", "gradient_accumulation_steps": 1}
    file = "preference:file-0" if loss in ("dpo", "orpo") else GOOD["training_file"]
    return TrainingConfig(**{**GOOD, "training_file": file, **values, **changes})


def sft_steps() -> tuple[int, int]:
    """Tokens of the largest step of `sft_step`, and of them those that are learned."""
    return 6_719, 6_719 - 16 * 33


def measured() -> dict[str, tuple[float, TrainingConfig, Tokens, int]]:
    """Peak in GiB, what ran, its largest batches, and the layers that kept activations."""
    largest, scored = sft_steps()
    sft = config(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    dpo = config("dpo", per_device_train_batch_size=16)
    pairs = 13_454
    sdft = config("sdft", per_device_train_batch_size=32)
    grpo = config("grpo", per_device_train_batch_size=32)
    cached, halves = 32 * 512, (32 * 456, 32 * 756)
    narrow = sft.model_copy(update={"load_in_4bit": True})
    return {
        "SFT, 16 rows": (37.6, sft, Tokens(largest, scored=scored), 28),
        "SFT, 16 rows, 4 bits": (28.6, narrow, Tokens(largest, scored=scored), 28),
        "DPO, 16 pairs": (59.5, dpo, Tokens(pairs, pairs, pairs - 32 * 33), 28),
        "SDFT, 32 rows": (64.8, sdft, Tokens(*halves, 32 * 256, cached), 28),
        "SDFT, 32 rows, 9 recomputed": (50.8, sdft, Tokens(*halves, 32 * 256, cached), 19),
        "SDFT, 32 rows, recomputed": (22.8, sdft, Tokens(*halves, 32 * 256, cached), 0),
        "GRPO, 32 rows": (64.2, grpo, Tokens(halves[0], 0, 32 * 256, cached), 28),
    }


@pytest.mark.parametrize("name", measured())
def test_peaks_of_gpus(name: str) -> None:
    peak, job, tokens, kept = measured()[name]
    estimate = vram_needed(job, QWEN_7B, tokens=tokens, kept_layers=kept)
    assert estimate.total / 2**30 == pytest.approx(peak, rel=WITHIN), str(estimate)
    # The control: with a third of the tokens less, it is another figure.
    fewer = Tokens(*(count * 2 // 3 for count in (tokens.micro, tokens.teacher, tokens.scored)))
    other = vram_needed(job, QWEN_7B, tokens=fewer, kept_layers=kept)
    assert other.total / 2**30 != pytest.approx(peak, rel=WITHIN)


LOSSES = st.sampled_from(("sft", "sdft", "grpo", "dpo", "orpo"))
SIZES = st.fixed_dictionaries(
    {
        "per_device_train_batch_size": st.sampled_from((2, 4, 16)),
        "max_seq_length": st.sampled_from((1_024, 2_048, 8_192)),
        "r": st.sampled_from((8, 64)),
        "load_in_4bit": st.booleans(),
        "gradient_accumulation_steps": st.sampled_from((4, 8)),
    }
)


@given(LOSSES, SIZES, st.sampled_from((0.5, 7.6, 32.8)))
def test_more_of_anything_takes_no_less(loss: str, sizes: dict[str, Any], billions: float) -> None:
    job, shape = config(loss, **sizes), usual_shape(billions)
    need = vram_needed(job, shape)
    assert all(part >= 0 for part in (need.weights, need.trained, need.activations))
    assert need.weights < need.total < 100 * need.weights + 2**40
    for name in ("per_device_train_batch_size", "max_seq_length", "r"):
        more = job.model_copy(update={name: 2 * getattr(job, name)})
        assert vram_needed(more, shape).total >= need.total
    if not job.load_in_4bit:
        small = vram_needed(job.model_copy(update={"load_in_4bit": True}), shape)
        assert small.weights < 0.6 * need.weights
    assert vram_needed(job, usual_shape(2 * billions)).total > need.total
    kept = [vram_needed(job, shape, kept_layers=count).total for count in (1, 2, shape.layers)]
    assert kept == sorted(kept)


@given(LOSSES, SIZES)
def test_the_settings_to_lower_lower_it(loss: str, sizes: dict[str, Any]) -> None:
    job, shape = config(loss, **sizes), usual_shape(7.6)
    first, second = settings_to_lower(job, shape)
    assert first != second

    def half(name: str) -> int:
        return vram_needed(
            job.model_copy(update={name: getattr(job, name) // 2}), shape
        ).total  # fmt: skip

    assert half(first) <= half(second) <= vram_needed(job, shape).total
    assert half(first) < vram_needed(job, shape).total


def test_a_job_asks_for_what_it_needs(home: Path) -> None:
    kind = FineTuning(OpenWeights(settings=Settings(home=home)))
    small, large, narrow = (
        kind.vram_gb(config(model=f"org/model-{size}", **more))
        for size, more in (("0.5B", {}), ("32B", {}), ("32B", {"load_in_4bit": True}))
    )
    assert small is not None and large is not None and narrow is not None
    assert small < 8 < narrow < 48 < large < 80
    assert kind.vram_gb(config(model="org/nameless")) == 24
    wider = config(model="org/model-7B", max_seq_length=16_384)
    assert (kind.vram_gb(wider) or 0) > (kind.vram_gb(config(model="org/model-7B")) or 0) + 4

    class Mine(FineTuning):
        requires_vram_gb = 70

    assert Mine(kind.ow).vram_gb(config(model="org/model-0.5B")) == 70


def test_adapters_outside_the_usual_layers() -> None:
    head, usual = (config(target_modules=names) for names in (["lm_head"], ["q_proj"]))
    both = config(target_modules=["q_proj", "lm_head"])
    assert trained_parameters(head, QWEN_7B) == 32 * (QWEN_7B.hidden + QWEN_7B.vocabulary)
    assert trained_parameters(both, QWEN_7B) == sum(
        trained_parameters(one, QWEN_7B) for one in (head, usual)
    )
    unknown = config(target_modules=["in_proj_qkvz"])
    for device in (GPU, CPU):
        needs = [vram_needed(job, QWEN_7B, device=device) for job in (usual, unknown, both)]
        assert needs[0].weights < needs[0].total < min(needs[1].total, needs[2].total)


JOINED = {
    "gpt_neox": (
        {},
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_proj", "c_fc"]),
    "bloom": ({"n_layer": 2, "n_head": 4}, ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"]),
    "phi3": ({}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "falcon": ({}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 128}, ["q_proj", "out_proj", "fc1", "fc2"]),
}


@pytest.mark.parametrize("kind", JOINED)
def test_adapters_on_layers_of_other_names_are_counted(kind: str) -> None:
    changes, modules = JOINED[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0, **changes}
    own = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(own)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=modules))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = shape_of(own.to_dict())
    assert shape is not None
    assert trained_parameters(config(target_modules=modules, r=8), shape) == trained


def test_layers_are_spread_where_a_gpu_is_too_small() -> None:
    """By the job and the GPUs alone; what is asked for holds the parts and what is not spread."""
    small, large = config(model="org/model-7B"), config(model="org/model-70B")
    card = 80 * 2**30
    assert not must_spread(small, 2, card) and must_spread(large, 2, card)
    assert not must_spread(large, 1, card) and not must_spread(large, 2, 3 * card)
    assert must_spread(config(model="org/model-7B", parallel="fsdp"), 2, card)
    assert not must_spread(config(model="org/model-70B", parallel="ddp"), 2, card)
    grpo = config("grpo", model="org/model-70B", per_device_train_batch_size=8)
    assert not must_spread(grpo, 2, card), "which it could not honour; the job says that it is full"
    one, two, four = (
        vram_needed(large, usual_shape(70.6), gpus=gpus).weights / 2**30 for gpus in (1, 2, 4)
    )
    assert one / 2 < two < one * 0.6 and one / 4 < four < two
    asked = gpu_gb(large, large.model) or 0
    on_each = vram_needed(large, usual_shape(70.6), gpus=2).total / 2**30 + CONTEXT_GB
    assert 0 <= asked - 2 * on_each < 2
    together = gpu_gb(large.model_copy(update={"parallel": "ddp"}), large.model) or 0
    assert together < asked, "what is not spread is there twice"
    assert (gpu_gb(small, small.model) or 0) < 80


def test_a_quantised_checkpoint_is_not_spread_by_itself(tmp_path: Path) -> None:
    sizes = {"vocab_size": 150_000, "hidden_size": 8192, "intermediate_size": 28_672}
    saved = {**sizes, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(saved))
    large = config(model=str(tmp_path))
    assert must_spread(large, 2, 80 * 2**30)
    file.write_text(json.dumps({**saved, "quantization_config": {"quant_method": "fp8"}}))
    assert not must_spread(large, 2, 80 * 2**30)


def test_what_is_asked_for_has_room_for_cuda() -> None:
    job = config(model="org/model-7B")
    need = vram_needed(job, usual_shape(7.0), device=GPU, tokens=most_tokens(job))
    asked = gpu_gb(job, job.model)
    assert asked is not None and 0 <= asked - CONTEXT_GB - need.total / 2**30 < 1
