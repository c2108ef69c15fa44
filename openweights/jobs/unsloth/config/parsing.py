"""Checks a job's parameters, and says of wrong names what people of other trainers mean by them.

The words for everything else are those of every job kind (`client/param_errors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from openweights.client.param_errors import describe_validation_error
from openweights.errors import ConfigError, closest
from openweights.jobs.unsloth.validate import TrainingConfig

# What people type who come from other trainers.
OTHER_NAMES = {
    "alpha": "lora_alpha",
    "epsilon": "grpo_epsilon",
    "judge_model": "grpo_judge_model",
    "max_completion_length": "grpo_max_completion_length",
    "num_generations": "grpo_num_generations",
    "reward_funcs": "grpo_reward_function",
    "reward_function": "grpo_reward_function",
    "batch_size": "per_device_train_batch_size",
    "dataset": "training_file",
    "dropout": "lora_dropout",
    "ft_id_suffix": "job_id_suffix",
    "grad_accum": "gradient_accumulation_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "lr": "learning_rate",
    "max_length": "max_seq_length",
    "max_new_tokens": "sdft_max_new_tokens",
    "max_seq_len": "max_seq_length",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "rank": "r",
    "suffix": "job_id_suffix",
    "teacher_update_rate": "sdft_ema_alpha",
    "temperature": "sdft_temperature",
    "top_p": "sdft_top_p",
    "train_file": "training_file",
    "validation_file": "test_file",
}


def training_config(
    params: Mapping[str, Any], kind: type[TrainingConfig] = TrainingConfig
) -> TrainingConfig:
    """Check a job's parameters.

    Args:
        kind: The fields that there are.

    Raises:
        ConfigError: Everything that is wrong, one problem a line.
    """
    try:
        return kind(**params)
    except ValidationError as error:
        lines = describe_validation_error(error, kind, unknown=_unknown)
        raise ConfigError("\n".join(lines)) from None


def _unknown(name: str, model: type[BaseModel]) -> str | None:
    """See `param_errors.Unknown`."""
    if not issubclass(model, TrainingConfig):
        return None
    if name == "grpo":
        return "is not a parameter; give its fields one by one, as grpo_num_generations=8"
    if name in OTHER_NAMES:
        return f"is not a parameter; did you mean {OTHER_NAMES[name]!r}?"
    if closest(name, list(TrainingConfig.model_fields)) is None:
        return f"is not a parameter; remove it, or put notes of your own into meta={{{name!r}: …}}"
    return None
