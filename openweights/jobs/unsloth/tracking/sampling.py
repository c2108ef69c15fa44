"""Completions sampled while the model trains, as files of the run.

Each is an event `{type: "samples", step, tag, path, file}`; a job's download delivers the file as
`samples/<tag>-<step>.jsonl`. The training is left untouched: random states and the model's mode are
put back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.events import Samples
from openweights.generation.choose import generation_engine
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.unsloth.config.examples import prompt_reader
from openweights.jobs.unsloth.config.rendering import prompt_messages
from openweights.jobs.unsloth.data import usable_rows
from openweights.jobs.unsloth.runtime.reporting import Reporter, log_rows
from openweights.jobs.unsloth.tracking.schedule import ScheduledCallback
from openweights.jobs.unsloth.validate import SamplingCallback
from openweights.models.forward import active_adapter

logger = logging.getLogger(__name__)


class Sampler(ScheduledCallback):
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
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[list[int]] = []
        name = f"sampling_callbacks ({settings.tag})"
        for at, ids in usable_rows(rows, prompt_reader(tokenizer), name=name):
            self._rows.append({**rows[at], "messages": prompt_messages(rows[at])})
            self._prompts.append(ids)
        doing, of = f"sampling answers ({settings.tag})", len(self._prompts)
        super().__init__(settings.eval_steps, doing, reporter.log, of=of)
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._seed = seed
        self._engine: GenerationEngine | None = None

    def measure(self, model: Any, step: int) -> None:
        if self._engine is None:
            self._engine = generation_engine("auto", model, self._tokenizer)
        params = SamplingParams(
            max_new_tokens=self._settings.max_tokens, temperature=self._settings.temperature
        )
        # Each its own seed: equal prompts are to be answered twice.
        requests = [
            GenerationRequest(
                prompt, params.with_seed(self._seed, step, index), active_adapter(model)
            )
            for index, prompt in enumerate(self._prompts)
        ]
        size = self._settings.batch_size
        completions = [
            own[0].text
            for start in range(0, len(requests), size)
            for own in self._engine.generate(requests[start : start + size])
        ]
        rows = [
            {**row, "completion": completion}
            for row, completion in zip(self._rows, completions, strict=True)
        ]
        event = Samples(step=step, tag=self._settings.tag)
        log_rows(self._reporter, event.data(), rows, folder="samples")
        logger.info("step %d: %d samples (%s)", step, len(completions), self._settings.tag)
