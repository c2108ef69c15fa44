"""What `fine_tuning.create(...)` takes: one flat set of fields, checked before it costs anything.

`training_config(params)` gives a `TrainingConfig` or raises one `ConfigError` that lists every
problem as `field: what is wrong; what to do`. Fields that belong to another loss are refused where
they ask for something, taken with a warning where they are at their default or harmless, and left
out of the dump, so that what is stored in a job holds only what counts. The
words for what pydantic refuses are those of every job kind (`client/param_errors.py`). Client-side:
no torch here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from pydantic import (
    BaseModel,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from openweights.client.param_errors import describe_validation_error
from openweights.errors import ConfigError
from openweights.jobs.unsloth.config.fields import (
    DEFAULT_TARGET_MODULES,
    FILE_PURPOSES,
    Count,
    DatasetRef,
    Loss,
    MultipleChoiceCallback,
    SamplingCallback,
    StepSchedule,
    TrainingFields,
)
from openweights.jobs.unsloth.config.other_names import done_anyway, meant_field
from openweights.jobs.unsloth.config.problems import config_problems, field_losses, unread_fields

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "FILE_PURPOSES",
    "Count",
    "DatasetRef",
    "Loss",
    "MultipleChoiceCallback",
    "SamplingCallback",
    "StepSchedule",
    "TrainingConfig",
    "training_config",
]

logger = logging.getLogger(__name__)


class TrainingConfig(TrainingFields):
    """A fine-tuning job's parameters (`TrainingFields`), checked against one another."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = dict(config_problems(self))
        if problems:
            text = "; ".join(f"{field}: {what}" for field, what in problems.items())
            raise PydanticCustomError("config", "{text}", {"text": text, "problems": problems})
        self._take_older_names()
        return self

    def _take_older_names(self) -> None:
        if not self.train_on_responses_only:
            self.train_on = "all"
        elif self.train_on == "all":
            self.train_on_responses_only = False
        if self.grpo_enable_thinking is not None:
            thinking = {"enable_thinking": self.grpo_enable_thinking}
            self.template_options = {**self.template_options, **thinking}

    @model_serializer(mode="wrap")
    def _only_own_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if self.loss in field_losses(k, self.loss)}


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
        config = kind(**params)
    except ValidationError as error:
        unknown = partial(_unknown, loss=params.get("loss"))
        lines = describe_validation_error(error, kind, unknown=unknown)
        raise ConfigError("\n".join(lines)) from None
    if unread := unread_fields(config):
        logger.warning("loss=%r does not read %s; left out", config.loss, ", ".join(unread))
    return config


def _unknown(name: str, model: type[BaseModel], loss: object) -> str | None:
    """What is said of a name that no field has; None for the general words."""
    if not issubclass(model, TrainingConfig):
        return None
    if name == "grpo":
        return "is not a parameter; give its fields one by one, as grpo_num_generations=8"
    if done := done_anyway(name):
        return f"is not a parameter: {done}; remove it"
    if meant := meant_field(name, loss):
        return f"is not a parameter; did you mean {meant!r}?"
    return f"is not a parameter; remove it, or put notes of your own into meta={{{name!r}: …}}"
