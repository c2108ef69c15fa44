"""Measurements of a model while it trains: before the first step, on a schedule, and at the end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights.jobs.stage import counted_stage
from openweights.jobs.unsloth.runtime.reporting import LogEvent


def is_due(step: int, schedule: int | str) -> bool:
    """Whether to measure at `step`, which is always so at step 0.

    Args:
        schedule: Every so many steps, or "log": at steps 1 to 10, 20, 30, … 100, 200, …
    """
    if step == 0:
        return True
    every = 10 ** (len(str(step)) - 1) if schedule == "log" else int(schedule)
    return step % every == 0


class ScheduledCallback(TrainerCallback):
    """Calls `measure` when it is time. Measuring must leave the training as it is.

    Args:
        doing: What it does, in words for who waits: the last steps' measurements take long.
        log_event: Receives that as a `Stage`, before each measurement and in a long one.
        of: How many answers or rows a measurement has; 0 where they are not counted.
        unit: What they are.
    """

    def __init__(
        self,
        schedule: int | str,
        doing: str,
        log_event: LogEvent,
        *,
        of: int = 0,
        unit: str = "answers",
    ) -> None:
        self._schedule = schedule
        self._doing = doing
        self._tell = log_event
        self._of, self._unit = of, unit
        self._last_step = -1

    def measure(self, model: Any, step: int) -> None:
        """What a subclass does."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run has measured before."""
        if state.global_step == 0:
            self._measure(kwargs["model"], 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_due(state.global_step, self._schedule):
            self._measure(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that was stopped goes on later, and has no end yet."""
        if state.global_step >= state.max_steps and state.global_step != self._last_step:
            self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: Any, step: int) -> None:
        self._last_step = step
        with counted_stage(self._tell, self._doing, of=self._of, unit=self._unit, step=step):
            self.measure(model, step)
