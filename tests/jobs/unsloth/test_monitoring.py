"""The monitoring callback against slow definitions on a tiny model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.monitoring import MonitoringCallback
from openweights.jobs.unsloth.sdft import sdft_train
from tests.jobs.unsloth.test_sdft import ROWS, adapters, assert_same, config, load, perturb
from tests.rounding import assert_sums_equal, terms_of


def begin(callback: MonitoringCallback, model: Any) -> None:
    state = type("State", (), {"global_step": 0})()
    callback.on_train_begin(None, state, None, model=model)  # type: ignore[arg-type]


def end_step(callback: MonitoringCallback, model: Any, step: int) -> None:
    state = type("State", (), {"global_step": step})()
    callback.on_step_end(None, state, None, model=model)  # type: ignore[arg-type]


def adapter_terms(model: Any) -> int:
    """Of a norm over all trained weights."""
    return 4 + sum(weights.numel() for weights in adapters(model).values())


@torch.no_grad()
def slow_kl_and_cosine(
    model: Any, examples: list[Any], direction: torch.Tensor
) -> tuple[float, float]:
    """One row at a time, full logits of the whole model, in float64."""
    model = copy.deepcopy(model).double()
    divergences, cosines = [], []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor(example["labels"])[1:]
        out = model(input_ids=ids, output_hidden_states=True)
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        own = out.logits[0, :-1].double().log_softmax(-1)
        learned = labels != -100
        divergences.append((base.exp() * (base - own)).sum(-1)[learned])
        # The output of the first of two layers is the second entry; the last one is normed.
        states = out.hidden_states[1][0, :-1][learned].double()
        cosines.append(
            states @ direction.double() / states.norm(dim=-1) / direction.double().norm()
        )
    return torch.cat(divergences).mean().item(), torch.cat(cosines).mean().item()


@pytest.mark.parametrize("modules", [("q_proj", "up_proj"), ("q_proj", "lm_head")])
def test_figures_equal_their_definitions(
    tiny: Path, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    model, tokenizer = load(tiny, modules=modules), AutoTokenizer.from_pretrained(tiny)
    events: list[dict[str, Any]] = []
    settings, direction = config(tmp_path), torch.randn(32)
    callback = MonitoringCallback(
        settings, tokenizer, ROWS, events.append,
        every_steps=2, layer=0, direction=direction, batch_size=3,
    )  # fmt: skip
    begin(callback, model)
    before = adapters(model)
    perturb(model, 5)
    model.train()
    end_step(callback, model, 1)
    end_step(callback, model, 2)
    assert [e["step"] for e in events] == [0, 2] and model.training
    first, second = events
    assert first["weight_difference_norm"] == 0 and abs(first["kl_to_base"]) < 1e-6
    kl, cosine = slow_kl_and_cosine(model, sft_examples(settings, tokenizer, ROWS), direction)
    terms = terms_of(model, 64)
    assert_sums_equal([second["kl_to_base"], second["cosine"]], [kl, cosine], terms, size=1.0)
    assert kl > 0.01
    moved = sum((p - before[n]).double().pow(2).sum() for n, p in adapters(model).items()).sqrt()
    assert_sums_equal(second["weight_difference_norm"], moved, adapter_terms(model))
    assert all(e["tag"] == "monitoring" and e["monitoring_s"] > 0 for e in events)


def test_direction_between_two_system_prompts(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny), AutoTokenizer.from_pretrained(tiny)
    callback = MonitoringCallback(
        config(tmp_path),
        tokenizer,
        ROWS,
        lambda event: None,
        layer=0,
        direction=("Be kind.", "No."),
    )
    begin(callback, model)
    means = []
    for system in ("Be kind.", "No."):
        states = []
        for row in ROWS:
            turns = [{"role": "system", "content": system}, row["messages"][0]]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[1][0, -1])
        means.append(torch.stack(states).mean(0))
    expected = means[0] - means[1]
    assert_sums_equal(callback._direction, expected / expected.norm(), terms_of(model, 64))


def test_training_is_the_same_with_it(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    settings = config(tmp_path, max_steps=4)
    results, events = [], []
    for watched in (False, True):
        model = load(tiny, dropout=0.1)
        callback = MonitoringCallback(
            settings, tokenizer, ROWS, events.append, every_steps=2, direction=("a", "b")
        )
        callbacks = [callback] if watched else []
        sdft_train(settings, model, tokenizer, ROWS, None, callbacks=callbacks)
        results.append(adapters(model))
    assert_same(*results)
    assert [e["step"] for e in events] == [0, 2, 4]
    norms = [e["weight_difference_norm"] for e in events]
    assert norms == sorted(norms) and all(-1 <= e["cosine"] <= 1 for e in events)
    # The older runner's names.
    assert [e["weight_diff_norm"] for e in events] == norms
    assert all(e["cos_sim"] == e["cosine"] != e["cos_sim_plain"] for e in events)
    assert events[0]["kl_vs_base"] == 0 < events[-1]["kl_vs_base"] != events[-1]["kl_to_base"]


def test_a_resumed_run_measures_from_the_first_weights(tiny: Path, tmp_path: Path) -> None:
    tokenizer, events = AutoTokenizer.from_pretrained(tiny), []
    half = config(tmp_path, max_steps=2, save_steps=2)
    sdft_train(half, load(tiny), tokenizer, ROWS, None)
    whole, model = half.model_copy(update={"max_steps": 3}), load(tiny)
    first = {name: value.clone() for name, value in adapters(model).items()}
    callback = MonitoringCallback(whole, tokenizer, ROWS, events.append, every_steps=3)
    checkpoint = str(Path(half.output_dir) / "checkpoint-2")
    sdft_train(whole, model, tokenizer, ROWS, None, callbacks=[callback], resume_from=checkpoint)
    moved = sum((p - first[n]).double().pow(2).sum() for n, p in adapters(model).items()).sqrt()
    found = [e["weight_difference_norm"] for e in events]
    assert_sums_equal(found, [float(moved)], adapter_terms(model))
