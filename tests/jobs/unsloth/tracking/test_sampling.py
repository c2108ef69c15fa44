"""Samples while training: when, of which prompts, and without a trace in the training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from openweights.jobs.unsloth.runtime.reporting import FolderReporter
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.tracking.sampling import Sampler
from openweights.jobs.unsloth.tracking.schedule import is_due
from openweights.jobs.unsloth.validate import SamplingCallback, training_config
from openweights.models.load import load_model
from tests.jobs.unsloth.malformed_configs import FILE, GOOD
from tests.tiny_model import make_tiny_model

PROMPT = [{"role": "user", "content": "Say something long"}]
ROWS: list[dict[str, Any]] = [
    {"messages": [*PROMPT, {"role": "assistant", "content": "Something"}], "id": 7},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "system", "content": "x"}, *PROMPT]},
]
TRAIN = [{"messages": ROWS[0]["messages"]}] * 4


def test_schedules() -> None:
    assert [step for step in range(31) if is_due(step, "log")] == [*range(11), 20, 30]
    assert [step for step in range(90, 1101) if is_due(step, "log")] == [
        *[90, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    ]
    assert [step for step in range(10) if is_due(step, 4)] == [0, 4, 8]


class Kept(FolderReporter):
    """Keeps the events in memory, too."""

    def __init__(self, folder: Path, settings: Any) -> None:
        super().__init__(folder, settings)
        self.events: list[dict[str, Any]] = []

    def log(self, data: Mapping[str, Any], file: Path | None = None) -> None:
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file else None
        self.events.append({**data, "rows": rows})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_samples_leave_the_training_as_it_is(tmp_path: Path, temperature: float) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    settings = training_config(
        {**GOOD, "model": str(tiny), "output_dir": str(tmp_path / "out"), "max_steps": 3}
        | {"lora_dropout": 0.3, "learning_rate": 1e-2, "warmup_steps": 0}
    )
    reporter = Kept(tmp_path / "run", settings)

    def run(*samplers: Any) -> list[float]:
        model, tokenizer = load_model(settings)
        callbacks = [make(tokenizer) for make in samplers]
        trainer = sft_train(settings, model, tokenizer, TRAIN, None, callbacks=callbacks)
        assert trainer.model.training
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    sampling = SamplingCallback(
        dataset=FILE, eval_steps=2, temperature=temperature, max_tokens=12, batch_size=2, tag="a/b"
    )
    without = run()
    assert run(lambda t: Sampler(sampling, ROWS, t, reporter, seed=3)) == without
    told = [event for event in reporter.events if event["type"] == "stage"]
    assert [(e["doing"], e["step"]) for e in told] == [
        ("sampling answers (a/b)", step) for step in (0, 2, 3)
    ]
    first = [event for event in reporter.events if event not in told]
    assert [(e["type"], e["step"], e["tag"]) for e in first] == [
        ("samples", step, "a/b") for step in (0, 2, 3)
    ]
    assert [e["path"] for e in first] == [f"samples/a_b-{step}.jsonl" for step in (0, 2, 3)]
    rows = first[0]["rows"]
    assert [row["messages"][-1]["role"] for row in rows] == ["user"] * 3 and rows[0]["id"] == 7
    assert all(isinstance(row["completion"], str) for row in rows)
    # The same seed gives the same samples; the trained model answers otherwise than the untrained.
    run(lambda t: Sampler(sampling, ROWS, t, reporter, seed=3))
    again = [event for event in reporter.events if event["type"] == "samples"][3:]
    assert again == first and first[0]["rows"] != first[2]["rows"]


def test_padding_does_not_change_greedy_samples(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    settings = training_config({**GOOD, "model": str(tiny), "output_dir": str(tmp_path / "out")})
    model, tokenizer = load_model(settings)
    answers = []
    for size in (1, 3):
        reporter = Kept(tmp_path / "run", settings)
        sampling = SamplingCallback(dataset=FILE, max_tokens=16, batch_size=size)
        with torch.no_grad():
            Sampler(sampling, ROWS, tokenizer, reporter, seed=0).measure(model, 0)
        answers.append([row["completion"] for row in reporter.events[0]["rows"]])
    assert answers[0] == answers[1]


def test_equal_prompts_are_answered_anew_in_each_batch(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    settings = training_config({**GOOD, "model": str(tiny), "output_dir": str(tmp_path / "out")})
    model, tokenizer = load_model(settings)
    reporter = Kept(tmp_path / "run", settings)
    sampling = SamplingCallback(dataset=FILE, max_tokens=8, batch_size=2, temperature=1.0)
    Sampler(sampling, [ROWS[1]] * 6, tokenizer, reporter, seed=0).measure(model, 0)
    answers = [row["completion"] for row in reporter.events[0]["rows"]]
    assert len(set(answers)) == 6
