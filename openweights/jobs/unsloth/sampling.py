"""Completions sampled while the model trains, as files of the run.

Each is an event `{type: "samples", step, tag, path, file}`; a job's download delivers the file as
`samples/<tag>-<step>.jsonl`. The training is left untouched: random states and the model's mode are
put back.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from openweights.jobs.unsloth.data import prompt_token_ids
from openweights.jobs.unsloth.model import eos_token_ids
from openweights.jobs.unsloth.reporting import Reporter
from openweights.jobs.unsloth.rollout import SamplingParams, TransformersRollout
from openweights.jobs.unsloth.rows import plain_messages
from openweights.jobs.unsloth.validate import SamplingCallback

logger = logging.getLogger(__name__)


def is_due(step: int, schedule: int | str) -> bool:
    """Whether to sample at `step`, which is always so at step 0.

    Args:
        schedule: Every so many steps, or "log": at steps 1 to 10, 20, 30, … 100, 200, …
    """
    if step == 0:
        return True
    every = 10 ** (len(str(step)) - 1) if schedule == "log" else int(schedule)
    return step % every == 0


class Sampler(TrainerCallback):
    """Answers the prompts of a dataset before training, on its schedule, and at the end."""

    def __init__(
        self,
        settings: SamplingCallback,
        rows: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        reporter: Reporter,
        *,
        seed: int,
    ) -> None:
        self._settings = settings
        self._rows = [{**row, "messages": _prompt(row)} for row in rows]
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._seed = seed
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`. A resumed run has sampled before."""
        if state.global_step == 0:
            self._sample(kwargs["model"], 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`."""
        if is_due(state.global_step, self._settings.eval_steps):
            self._sample(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback`. A run that was stopped goes on later, and has no end yet."""
        if state.global_step >= state.max_steps and state.global_step != self._last_step:
            self._sample(kwargs["model"], state.global_step)

    def _sample(self, model: Any, step: int) -> None:
        self._last_step = step
        size, completions = self._settings.batch_size, []
        prompts = [prompt_token_ids(self._tokenizer, row["messages"]) for row in self._rows]
        engine = TransformersRollout(model, int(self._tokenizer.pad_token_id))  # type: ignore[arg-type]
        params = SamplingParams(
            max_new_tokens=self._settings.max_tokens,
            temperature=self._settings.temperature,
            top_p=1.0,
            eos_token_ids=tuple(eos_token_ids(model, self._tokenizer)),
        )
        for start in range(0, len(prompts), size):
            rollout = engine.generate(prompts[start : start + size], params, seed=self._seed + step)
            completions += self._tokenizer.batch_decode(
                rollout.completions, skip_special_tokens=True
            )
        self._keep(completions, step)

    def _keep(self, completions: Sequence[str], step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self._settings.tag.replace('/', '_')}-{step}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for row, completion in zip(self._rows, completions, strict=True):
                    file.write(json.dumps({**row, "completion": completion}) + "\n")
            event = {"type": "samples", "step": step, "tag": self._settings.tag}
            self._reporter.log({**event, "path": f"samples/{path.name}"}, file=path)
        logger.info("step %d: %d samples (%s)", step, len(completions), self._settings.tag)


def _prompt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = plain_messages(row)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
