"""Rollouts have the model's own distribution and ends, and touch nothing else of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from openweights.generation.choose import rollout_engine
from openweights.generation.engine import cut_at_eos
from openweights.generation.params import SamplingParams
from tests.tiny_model import make_tiny_model

PAD = 3
ENGINES = ["transformers", pytest.param("cuda_graph", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every engine passes every test here; `engine.model` is the model that it samples from."""
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if request.param == "cuda_graph":
        model = model.to("cuda")
    engine = rollout_engine(request.param, model, PAD)
    engine.model = model
    return engine


def params(**changes: Any) -> SamplingParams:
    values = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": (2, 0)}
    return SamplingParams(**{**values, **changes})


@torch.no_grad()
def logits_after(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids], device=model.device)).logits[0, -1]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Step by step, without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_after(model, ids).argmax()))
    return ids[len(prompt) :]


PROMPTS = [[10, 11, 12], [40], [7, 8, 9, 10, 11, 12, 13, 14], [99, 5]]


def test_cold_sampling_equals_greedy_decoding_of_each_prompt_alone(engine: Any) -> None:
    rollout = engine.generate(PROMPTS, params(temperature=1e-4, stop_token_ids=()), seed=1)
    assert rollout.completions == [greedy(engine.model, prompt, 8) for prompt in PROMPTS]
    assert rollout.ended == [False] * 4 and rollout.tokens == 32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_have_the_models_distribution(engine: Any, temperature: float) -> None:
    """Chi-square over the ten most likely tokens and the rest; a longer prompt pads this one."""
    count = 4_000
    prompts = [PROMPTS[0]] * count + [PROMPTS[2]]
    rollout = engine.generate(prompts, params(max_new_tokens=1, temperature=temperature), seed=7)
    sampled = torch.tensor([row[0] for row in rollout.completions[:count]])

    def statistic(with_temperature: float) -> float:
        logits = logits_after(engine.model, PROMPTS[0]).double().cpu()
        top, ids = (logits / with_temperature).softmax(-1).topk(10)
        seen = torch.stack([(sampled == i).sum() for i in ids]).double()
        expected = torch.cat([top, 1 - top.sum(0, keepdim=True)]) * count
        observed = torch.cat([seen, count - seen.sum(0, keepdim=True)])
        return float(((observed - expected) ** 2 / expected).sum())

    critical = 29.59  # 10 degrees of freedom, p = 0.001; the seed is fixed, so this cannot flake
    assert statistic(temperature) < critical
    assert statistic(temperature * 1.3) > critical, "the test can tell another temperature"


def test_every_eos_ends_a_completion_and_belongs_to_it(engine: Any) -> None:
    prompts = [PROMPTS[i % 4] for i in range(64)]
    eos = (20, 30, 40, 50, 60, 70, 80, 90, 100, 110)
    rollout = engine.generate(
        prompts, params(max_new_tokens=40, temperature=5.0, stop_token_ids=eos), seed=3
    )
    last = {row[-1] for row, ended in zip(rollout.completions, rollout.ended, strict=True) if ended}
    assert len(last) > 1, "more than one of the ids was met"
    for row, ended in zip(rollout.completions, rollout.ended, strict=True):
        assert ended == (row[-1] in eos) and not set(row[:-1]) & set(eos)
        assert ended or len(row) == 40


def test_the_models_own_generation_config_does_not_bend_the_samples(engine: Any) -> None:
    plain = engine.generate(PROMPTS, params(), seed=5)
    own = engine.model.generation_config
    own.update(repetition_penalty=5.0, top_k=1, min_p=0.9)
    try:
        assert engine.generate(PROMPTS, params(), seed=5).completions == plain.completions
        assert engine.model.generation_config is own, "and it is given back"
    finally:
        own.update(repetition_penalty=None, top_k=None, min_p=None)


def test_a_seed_decides_alone_and_leaves_the_process_as_it_was(engine: Any) -> None:
    engine.model.train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = engine.generate(PROMPTS, params(), seed=11)
    assert torch.equal(torch.rand(3), expected) and engine.model.training
    assert engine.generate(PROMPTS, params(), seed=11).completions == first.completions
    assert engine.generate(PROMPTS, params(), seed=12).completions != first.completions


def test_cut_at_eos() -> None:
    assert cut_at_eos([5, 6, 2, 3, 3], (2,)) == ([5, 6, 2], True)
    assert cut_at_eos([2, 2], (2,)) == ([2], True)
    assert cut_at_eos([5, 6], (2,)) == ([5, 6], False)
