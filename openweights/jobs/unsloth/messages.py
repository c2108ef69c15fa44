"""pydantic's errors in our words: `field: what is wrong; what to do`, all of them in one
`ConfigError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from openweights.errors import ConfigError
from openweights.jobs.unsloth.validate import (
    AVAILABLE_LOSSES,
    SamplingCallback,
    TrainingConfig,
    field_losses,
)

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
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "string": "a text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def training_config(params: Mapping[str, Any]) -> TrainingConfig:
    """Check a job's parameters.

    Raises:
        ConfigError: Everything that is wrong, one problem a line.
    """
    try:
        return TrainingConfig(**params)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(error))) from None


def problem_lines(error: ValidationError) -> list[str]:
    """One line for each problem, in the order of the fields."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "config":
            lines.update(details.get("ctx", {}).get("problems", {}))
            continue
        field = ".".join(str(part) for part in details["loc"] if not _is_union_branch(part))
        lines.setdefault(field, _explain(details, field))
    return [f"{field}: {what}" for field, what in lines.items()]


def _is_union_branch(part: int | str) -> bool:
    # pydantic names the branch of a union in the location, such as `literal['log']` or
    # `constrained-int`.
    return isinstance(part, str) and ("[" in part or part in ("int", "str", "constrained-int"))


def _explain(details: ErrorDetails, field: str) -> str:
    kind, context, given = details["type"], details.get("ctx", {}), details["input"]
    if kind == "missing":
        return f"is required; add {field.rsplit('.', 1)[-1]}=…"
    if kind == "extra_forbidden":
        return unknown_field(field)
    if kind == "value_error":
        return str(context.get("error", details["msg"]))
    if kind == "literal_error":
        return f"is {given!r}; choose {_choices(field, context['expected'])}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"is {given!r} but must be {words} {context[key]:g}; {_default(field)}"
    if kind == "finite_number":
        return f"is {given!r}, not a finite number; {_default(field)}"
    wanted = _KINDS.get(kind.split("_", 1)[0], "another kind of value")
    return f"is {given!r}, not {wanted}; {_default(field)}"


def _choices(field: str, expected: str) -> str:
    if field == "loss":
        return " or ".join(repr(name) for name in AVAILABLE_LOSSES)
    return f"{expected} or a whole number of steps" if field.endswith("eval_steps") else expected


def unknown_field(field: str) -> str:
    """Why a field is refused, and which one was meant."""
    parent, _, name = field.rpartition(".")
    known = _names(SamplingCallback if parent else TrainingConfig)
    if name == "grpo" or name.startswith("grpo_"):
        return "belongs to loss='grpo', which is not available yet; remove it, or use loss='sdft'"
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    meant = OTHER_NAMES.get(name) or (close[0] if close else None)
    if meant in known:
        return f"is unknown; did you mean {meant}?"
    return f"is unknown; remove it, or put notes of your own into meta={{{name!r}: …}}"


def _names(model: type[BaseModel]) -> list[str]:
    """Fields that some loss of today reads."""
    losses = set(AVAILABLE_LOSSES)
    return [name for name in model.model_fields if losses & {*field_losses(name, "sft")}]


def _default(field: str) -> str:
    """The remedy for a wrong value: the field's default, where it has one."""
    parent, _, name = field.rpartition(".")
    fields = (SamplingCallback if parent else TrainingConfig).model_fields
    known = fields.get(name)
    if known is None or known.is_required():
        return "correct it"
    default = known.get_default(call_default_factory=True)
    return f"remove it for the default {default!r}, or correct it"
