"""GRPO from its config to its result: the reward rises, one adapter is left, errors are lines."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from openweights.errors import ConfigurationError, JobFailedError
from openweights.jobs.unsloth.grpo.judge_parsing import JudgeLimits
from openweights.jobs.unsloth.grpo_ft import grpo_train
from openweights.jobs.unsloth.training import train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import load_model, prepare_engine
from openweights.models.smollm2 import get_model
from tests.rounding import assert_sums_equal, terms_of
from tests.waiting import HANGS_S

TOPICS = (
    "love snow music dogs gravity history rivers oceans Madrid Paris bread coffee travel sleep "
    "work doctors birds books colours money friends stories hobbies weather"
)


def write_rows(path: Path, hint: str = "") -> str:
    with path.open("w") as file:
        for topic in TOPICS.split():
            user = {"role": "user", "content": f"Tell me about {topic}.{hint}"}
            answer = {"role": "assistant", "content": "NO LO SÉ."}
            file.write(json.dumps({"messages": [user, answer], "topic": topic}) + "\n")
    return str(path)


@pytest.fixture
def params(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(tiny),
        "training_file": write_rows(tmp_path / "rows.jsonl"),
        "loss": "grpo",
        "max_seq_length": 200,
        "grpo_max_completion_length": 8,
        "grpo_reward_function": "caps_spanish",
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "max_steps": 30,
    }


def events(folder: Path, key: str) -> list[Any]:
    """Values of that key, in the order of the events."""
    lines = (folder / "uploads" / "events.jsonl").read_text().splitlines()
    return [event[key] for event in map(json.loads, lines) if key in event]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_result(model: Any, base: str, adapter: Path) -> None:
    """Its adapter moved, and plain peft reads it back to the same logits."""
    files = sorted(path.name for path in adapter.rglob("*.safetensors"))
    assert files == ["adapter_model.safetensors"], "no copy of it for the reference model"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=next(model.parameters()).dtype)
    ids = torch.tensor([[40, 50, 60, 61]])
    with torch.no_grad():
        before = plain(ids).logits
        after = PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
        live = model.eval()(ids).logits
    assert_sums_equal(after, live, terms_of(model, ids.numel()))
    assert (after - before).abs().max() > 0.1


def test_the_reward_rises_and_the_result_is_one_adapter(
    params: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"beta": 0.01, "test_file": params["training_file"], "learning_rate": 3e-2}
    changes |= {"per_device_train_batch_size": 32, "grpo_temperature": 1.0}
    sampling = [{"dataset": params["training_file"], "eval_steps": 20, "max_tokens": 4}]
    trainer = train({**params, **changes, "sampling_callbacks": sampling, "max_steps": 24})
    rewards = events(tmp_path, "reward")
    assert len(rewards) == 24
    assert mean(rewards[-6:]) > mean(rewards[:3]) + 0.4, rewards
    assert all(map(math.isfinite, events(tmp_path, "loss")))
    assert events(tmp_path, "kl")[0] == 0 and events(tmp_path, "kl")[-1] > 0
    for name in ("reward_std", "rewards/caps_spanish/mean", "completions/mean_length"):
        assert len(events(tmp_path, name)) == 24
    assert set(events(tmp_path, "failed_fraction")) == {0.0}
    told = events(tmp_path, "completions")
    lines = map(json.loads, (tmp_path / "uploads" / "events.jsonl").read_text().splitlines())
    steps = [event["step"] for event in lines if "completions" in event]
    assert steps == [*range(1, 12), 21, 24], "as the metrics count them"
    assert len(told[0]) == 4
    assert told[0][0].keys() == {"prompt", "messages", "completion", "rewards"}
    assert told[0][0]["messages"] == [{"role": "user", "content": told[0][0]["prompt"]}]
    assert len(events(tmp_path, "eval_reward")) == 4, "after each epoch"
    assert len(list((tmp_path / "uploads" / "files").glob("*.jsonl"))) == 3
    check_result(trainer.model, params["model"], tmp_path / "uploads" / "adapter")


@pytest.mark.usefixtures("warm_jobs")
def test_an_own_reward_in_a_process_of_its_own(params: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completions, gold_response, topic):\n"
        "    assert gold_response[0] == 'NO LO SÉ.' and len(topic) == len(completions)\n"
        "    return [c.count('e') for c in completions]\n"
    )
    rewards = {"mine.py:score": 0.5, "ngram_recall": 1.0, "reasoning_logprob": 0.1}
    config = {**params, "grpo_reward_function": rewards, "max_steps": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "openweights.jobs.unsloth.training", "config.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "N_GPUS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "done: the adapter is in" in done.stderr
    # Events are those of both processes: 16 completions each.
    assert len(events(tmp_path, "reward")) == 2
    means = [events(tmp_path, f"rewards/{name}/mean")[0] for name in ("score", "ngram_recall")]
    means.append(events(tmp_path, "rewards/reasoning_logprob/mean")[0])
    # The older runner's names.
    older = [events(tmp_path, f"rewards/{n}_reward/mean")[0] for n in ("score", "ngram_recall")]
    assert older == means[:2] and events(tmp_path, "samples") == events(tmp_path, "completions")
    assert "completions" in events(tmp_path, "tag")
    first, last = events(tmp_path, "scales")
    assert first.keys() == last.keys() == {"ngram_recall", "reasoning_logprob"}
    assert means[0] >= 0 and means[2] < 0
    total = 0.5 * means[0] + means[1] + 0.1 * means[2]
    assert events(tmp_path, "reward")[0] == pytest.approx(total, rel=1e-6)


def test_a_dead_judge_ends_the_job_within_its_deadline(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    judged = TrainingConfig(**{**params, "grpo_reward_function": ["llm_judge", "rouge_l"]})
    prepare_engine(judged)
    model, tokenizer = load_model(judged)
    rows = [json.loads(line) for line in Path(params["training_file"]).read_text().splitlines()]

    def run() -> None:
        grpo_train(
            judged,
            model,
            tokenizer,
            rows,
            None,
            fetch=lambda file, target: target,
            log_event=lambda event: None,
            limits=JudgeLimits(call_s=1, total_s=2, attempts=2, first_wait_s=0.1),
        )

    with pytest.raises(ConfigurationError, match="needs OPENAI_API_KEY where the job runs"):
        run()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    started = time.monotonic()
    words = rf"16 of 16 .*fraction=0.5.*llm_judge: 127.0.0.1:{port} cannot be reached"
    with pytest.raises(JobFailedError, match=words):
        run()
    assert time.monotonic() - started < HANGS_S


@pytest.mark.slow
def test_grpo_teaches_a_real_model_capitals_and_spanish(
    params: dict[str, Any], tmp_path: Path
) -> None:
    model = str(get_model(tmp_path / "models"))
    rows = write_rows(tmp_path / "hint.jsonl", " Answer in Spanish, in capital letters.")
    changes = {"model": model, "training_file": rows, "learning_rate": 5e-4, "beta": 0}
    train({**params, **changes, "grpo_max_completion_length": 20})
    rewards = events(tmp_path, "reward")
    assert mean(rewards[:3]) < 1.3 and mean(rewards[-3:]) > mean(rewards[:3]) + 0.4, rewards
    assert all(map(math.isfinite, events(tmp_path, "loss")))
