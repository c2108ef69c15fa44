"""Adapters of peft on a model: which one counts, and how others come to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from openweights.errors import ConfigError


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that a `PeftModel` computes with; None without one."""
    inner: Any = model
    return inner.active_adapter if hasattr(inner, "get_base_model") else None


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Every adapter that a model has."""
    return tuple(getattr(model, "peft_config", ()))


def with_adapter(model: Any, name: str, folder: Path) -> Any:
    """The model with an adapter from a folder, in the place of one of that name.

    Raises:
        ConfigError: The folder holds none that fits the model.
    """
    from peft import PeftModel

    try:
        if not adapter_names(model):
            return PeftModel.from_pretrained(model, folder, adapter_name=name)
        if name in adapter_names(model):
            model.delete_adapter(name)
        model.load_adapter(folder, name)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"adapter {name!r}: {folder} cannot be loaded ({error})") from error
    return model
