"""Measures a run while it trains; mounted by `MonitoredFineTuning`.

The measuring itself is `openweights.jobs.unsloth.monitoring`. What this adds is what is known only
once the trainer is built: the tokenizer as the trainer has it, and the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights.jobs.unsloth.monitoring import MonitoringCallback
from openweights.jobs.unsloth.validate import TrainingConfig

DEPTH = 2 / 3  # of the layer whose states are compared with the direction


class Monitor(TrainerCallback):
    """Logs an event with `tag="monitoring"` every `eval_steps` steps.

    Args:
        rows: Conversations on whose answers is measured.
        direction: Two contrasting system prompts.
    """

    def __init__(
        self,
        config: TrainingConfig,
        rows: Sequence[dict[str, Any]],
        log_event: Callable[[dict[str, Any]], None],
        *,
        eval_steps: int,
        direction: tuple[str, str],
    ) -> None:
        self._given = (config, rows, log_event)
        self._eval_steps = eval_steps
        self._direction = direction
        self._inner: MonitoringCallback | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`. A checkpoint to resume from is loaded after this."""
        config, rows, log_event = self._given
        layers = kwargs["model"].config.get_text_config().num_hidden_layers
        self._inner = MonitoringCallback(
            config,
            kwargs["processing_class"],
            rows,
            log_event,
            every_steps=self._eval_steps,
            layer=int(layers * DEPTH),
            direction=self._direction,
        )
        self._inner.on_init_end(args, state, control, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        if self._inner is not None:
            self._inner.on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        if self._inner is not None:
            self._inner.on_step_end(args, state, control, **kwargs)
