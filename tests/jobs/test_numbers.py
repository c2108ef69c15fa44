"""Absurd numbers that are finite: each field of each kind refuses them by its name, or can be meant
so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from openweights.client.job_options import JobOptions
from openweights.client.param_errors import describe_validation_error
from openweights.errors import ConfigError
from openweights.jobs.api import ApiConfig
from openweights.jobs.evaluate import EvaluateConfig
from openweights.jobs.inference.config import InferenceConfig
from openweights.jobs.inspect_ai import InspectConfig
from openweights.jobs.mmlu_pro import MMLUProConfig
from openweights.jobs.numbers import LEAST, MOST_GB, check_memory
from openweights.jobs.scoring import ScoringParams
from openweights.jobs.unsloth.config.problems import field_losses
from openweights.jobs.unsloth.validate import (
    MultipleChoiceCallback,
    SamplingCallback,
    TrainingConfig,
)
from openweights.jobs.weighted_sft import WeightedSFTConfig
from tests.jobs.unsloth.malformed_configs import DPO, FILE, GOOD, GRPO, SDFT
from tests.waiting import HANGS_S

Case = tuple[type[BaseModel], dict[str, Any]]

TESTED = {"test_file_eval_strategy": "steps", "test_file_eval_steps": 5}
KINDS: dict[str, Case] = {
    "sft": (TrainingConfig, {**GOOD, "test_file": FILE, **TESTED}),
    "sdft": (TrainingConfig, {**SDFT, "sdft_demo_placement": "turns"}),
    "dpo": (TrainingConfig, DPO),
    "orpo": (TrainingConfig, {**DPO, "loss": "orpo"}),
    "grpo": (TrainingConfig, GRPO),
    "weighted_sft": (WeightedSFTConfig, {k: v for k, v in GOOD.items() if k != "loss"}),
    "sampling": (SamplingCallback, {"dataset": FILE}),
    "questions": (MultipleChoiceCallback, {"dataset": FILE}),
    "inference": (InferenceConfig, {"model": "org/name", "input_file_id": FILE}),
    "evaluate": (EvaluateConfig, {"models": ["org/name"], "suite": ["gsm8k"]}),
    "scoring": (ScoringParams, {"model": "org/name", "dataset": FILE}),
    "api": (ApiConfig, {"model": "org/name"}),
    "mmlu_pro": (MMLUProConfig, {"model": "org/name"}),
    "inspect_ai": (InspectConfig, {"model": "org/name", "eval_name": "inspect_evals/gpqa"}),
}
# Numbers on a scale of one's own.
LARGEST = {"sdft_gate_margin": 1e15, "grpo_judge_best": 1e15}
UNREAD = ("gpu_util",)  # taken for older scripts
USUAL_LARGEST = 2**63


def absurd() -> Iterator[int | float]:
    """Of every size, whole and not."""
    yield from (1e-300, 1e300, -1e-300, -1e300, 10**12, -(10**12), 10**30, 10**400, 1.5e9)
    draw = random.Random(0)
    for _ in range(8):
        number = 10 ** draw.uniform(-320, 308)
        yield number if draw.random() < 0.5 else -number
        yield int(10 ** draw.uniform(9, 300))


def numeric_fields(model: type[BaseModel]) -> list[str]:
    fields = model.model_fields.items()
    return [name for name, f in fields if _is_numeric(f.annotation) and name not in UNREAD]


def _is_numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_numeric, get_args(annotation)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_absurd_number_is_refused_by_the_name_of_its_field(kind: str) -> None:
    model, good = KINDS[kind]
    model(**good)  # the control
    names = numeric_fields(model)
    loss = good.get("loss", "sft")
    read = [name for name in names if loss in field_losses(name, loss)]
    assert len(read) >= 1, "the control"
    for name in read:
        for value in absurd():
            began = time.monotonic()
            try:
                taken = getattr(model(**{**good, name: value}), name)
            except ValidationError as error:
                lines = describe_validation_error(error, model)
                assert any(line.startswith(f"{name}: ") for line in lines), (name, value, lines)
                continue
            finally:
                assert time.monotonic() - began < HANGS_S, (name, value)
            size = abs(taken)
            largest = LARGEST.get(name, USUAL_LARGEST)
            assert size == 0 or LEAST <= size <= largest, (name, value, taken)


def test_how_a_job_runs_takes_no_absurd_numbers_either() -> None:
    for name in numeric_fields(JobOptions):
        for value in absurd():
            try:
                JobOptions.of({name: value})
            except ConfigError as error:
                assert str(error).startswith(f"{name}: "), (name, value, str(error))


def test_memory_that_no_machine_has_is_told_of_the_field_that_asks_for_it() -> None:
    sizes = {"max_seq_length": (2048, 2048), "per_device_train_batch_size": (90_000, 2)}
    assert check_memory(MOST_GB, sizes) == MOST_GB and check_memory(None, sizes) is None
    with pytest.raises(ConfigError, match="^per_device_train_batch_size: 90000 would take"):
        check_memory(MOST_GB + 1, sizes)
