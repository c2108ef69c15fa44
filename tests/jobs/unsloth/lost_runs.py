"""A run whose machine is gone at a step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Lost(Exception):
    """The machine is gone."""


class LoseAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Lost
