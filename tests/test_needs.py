"""What a machine lacks is said before a job is queued there, and only what is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from openweights import ConfigError, OpenWeights
from openweights.jobs.inference import answering_needs
from openweights.jobs.unsloth.config.machine import training_needs
from openweights.jobs.unsloth.validate import training_config
from openweights.needs import Need, has_gpu, has_package, unmet_needs
from openweights.settings import Settings
from tests.client.conftest import QuietClient

BASE: dict[str, Any] = {"model": "org/model", "training_file": "conversations:file-1"}
SFT, SDFT, GRPO = ({**BASE, "loss": loss} for loss in ("sft", "sdft", "grpo"))


def lines(needs: list[Need], *, gpu: bool, packages: set[str], variables: bool) -> list[str]:
    return unmet_needs(
        needs,
        has_gpu=lambda: gpu,
        has_package=packages.__contains__,
        has_variable=lambda _: variables,
    )


TRAINS = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "openai"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {**SFT, "load_in_4bit": True},
            "load_in_4bit: it needs a GPU and the package bitsandbytes",
        ),
        ({**SFT, "engine": "unsloth"}, "engine: it needs a GPU and the package unsloth"),
        ({**SDFT, "sdft_rollout_engine": "vllm"}, "sdft_rollout_engine: it needs the package vllm"),
        ({**SDFT, "sdft_rollout_engine": "cuda_graph"}, "sdft_rollout_engine: it needs a GPU"),
        ({**GRPO, "grpo_use_vllm": True}, "grpo_use_vllm: it needs the package vllm"),
        ({**GRPO, "rollout_precision": "fp8"}, "rollout_precision: it needs a GPU"),
        ({**SFT, "report_to": ["wandb"]}, "report_to: it needs the package wandb"),
        (
            {**GRPO, "grpo_reward_function": "llm_judge"},
            "grpo_reward_function: it needs the variable OPENAI_API_KEY",
        ),
    ],
)
def test_what_training_needs(given: dict[str, Any], said: str) -> None:
    needs = training_needs(training_config(given))
    [line] = lines(needs, gpu=False, packages=TRAINS, variables=False)
    assert line.startswith(f"{said}, which this machine lacks; ")
    everything = TRAINS | {"bitsandbytes", "unsloth", "vllm", "wandb"}
    assert lines(needs, gpu=True, packages=everything, variables=True) == []
    # The control: a config without the field needs none of it.
    plain = training_config({**BASE, "loss": given["loss"]})
    assert lines(training_needs(plain), gpu=False, packages=TRAINS, variables=False) == []


def test_what_answering_needs() -> None:
    def lacking(*models: str, **asked: Any) -> list[str]:
        needs = answering_needs(models, asked.pop("engine", "auto"), **asked)
        return lines(needs, gpu=False, packages=TRAINS, variables=False)

    assert lacking("org/model") == []
    [vllm] = lacking("org/model", engine="vllm")
    assert vllm == "engine: it needs the package vllm, which this machine lacks; use 'auto'"
    assert lacking("org/model", in_4bit=True)[0].startswith("quantization: it needs the package")
    assert lacking("org/model", engine="cuda_graph")[0].startswith("engine: it needs a GPU")
    key = "it needs the variable OPENAI_API_KEY, which this machine lacks; export OPENAI_API_KEY=…"
    assert lacking("openai/gpt-4.1", engine="vllm") == [f"model: {key}"]
    assert lacking("org/model", judge="suite") == [f"suite: {key}"]


def test_without_the_extra_it_is_named() -> None:
    needs = training_needs(training_config(SFT))
    [line] = lines(needs, gpu=False, packages=TRAINS - {"trl", "peft"}, variables=False)
    assert line == (
        "such a job needs the package trl and the package peft, which this machine lacks; "
        "pip install 'openweights[train]'"
    )


def test_a_machine_that_may_have_a_gpu_counts_as_one(tmp_path: Path) -> None:
    """Only what is known to be missing is refused: a broken nvidia-smi says nothing."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    nvidia_smi.chmod(0o755)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert has_gpu({"PATH": str(tmp_path), **hidden})
    assert not has_gpu({"PATH": str(tmp_path / "nothing"), **hidden})


needs_none = pytest.mark.skipif(has_gpu(dict(os.environ)), reason="of a machine without a GPU")


@needs_none
def test_it_is_said_when_it_is_submitted(home: Path, tmp_path: Path) -> None:
    ow = QuietClient()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )
    given = {"model": "org/model", "training_file": str(rows), "loss": "sft", "load_in_4bit": True}
    with pytest.raises(ConfigError, match="load_in_4bit: it needs a GPU"):
        ow.fine_tuning.create(**given)
    with pytest.raises(ConfigError, match="engine: it needs a GPU"):
        ow.evaluate.create(models="org/model", suite="gsm8k", engine="cuda_graph")
    assert not has_package("vllm")
    for asking in (ow.inference, ow.evaluate, ow.mmlu_pro, ow.inspect_ai, ow.api):
        asked: dict[Any, dict[str, Any]] = {
            ow.inference: {"model": "org/model", "input_file_id": str(rows)},
            ow.evaluate: {"models": "org/model", "suite": "gsm8k"},
            ow.mmlu_pro: {"model": "org/model"},
            ow.inspect_ai: {"model": "org/model", "eval_name": "inspect_evals/gsm8k"},
            ow.api: {"model": "org/model"},
        }
        with pytest.raises(ConfigError, match="engine: it needs the package vllm"):
            asking.create(**asked[asking], engine="vllm")
    assert ow.jobs.list() == []


def test_of_the_machines_of_a_project_nothing_is_known(home: Path) -> None:
    """The control is above."""
    remote = Settings(
        home, supabase_url="http://127.0.0.1:9", supabase_anon_key="k", api_key="ow_k"
    )
    kind = OpenWeights(settings=remote).fine_tuning
    kind._check_this_machine(training_config({**SFT, "load_in_4bit": True}))  # pyright: ignore[reportPrivateUsage]
