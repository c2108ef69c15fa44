"""Checks a job's parameters, and says of wrong names what people of other trainers mean by them.

The words for everything else are those of every job kind (`client/param_errors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from openweights.client.param_errors import closest, describe_validation_error
from openweights.errors import ConfigError
from openweights.jobs.unsloth.validate import TrainingConfig

# What people type who come from other trainers.
OTHER_NAMES = {
    "alpha": "lora_alpha",
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


def training_config(params: Mapping[str, Any]) -> TrainingConfig:
    """Check a job's parameters.

    Raises:
        ConfigError: Everything that is wrong, one problem a line.
    """
    try:
        return TrainingConfig(**params)
    except ValidationError as error:
        lines = describe_validation_error(error, TrainingConfig, unknown=_unknown)
        raise ConfigError("\n".join(lines)) from None


def _unknown(name: str, model: type[BaseModel]) -> str | None:
    """See `param_errors.Unknown`."""
    if model is not TrainingConfig:
        return None
    if name == "eval_every_n_steps":
        return (
            "is not read by any loss; remove it, and use test_file_eval_steps, or eval_steps of "
            "sampling_callbacks"
        )
    if name == "grpo" or name.startswith("grpo_"):
        return "belongs to loss='grpo', which is not available yet; remove it, or use loss='sdft'"
    if name in OTHER_NAMES:
        return f"is not a parameter; did you mean {OTHER_NAMES[name]!r}?"
    if closest(name, list(TrainingConfig.model_fields)) is None:
        return f"is not a parameter; remove it, or put notes of your own into meta={{{name!r}: …}}"
    return None
