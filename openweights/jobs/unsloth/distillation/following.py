"""What is measured while SDFT trains, beside its loss.

- The teacher gate again (`gate.py`): how well the student answers by now, and whether its teacher
  is still better. A teacher that follows its student can drift with it and take the skill along.
- How far the model has moved where nothing was to change: KL to the base on the base's own answers
  to everyday prompts (`monitoring.py`).

Both at the start, every `sdft_gate_steps` steps, and at the end.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from openweights.errors import JobFailedError
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.stage import counted_stage
from openweights.jobs.unsloth.config.demonstrations import Showing
from openweights.jobs.unsloth.distillation.gate import DOING, Gate
from openweights.jobs.unsloth.monitoring import kl_to_base, learned_positions
from openweights.jobs.unsloth.runtime.reporting import LogEvent
from openweights.jobs.unsloth.tracking.schedule import ScheduledCallback
from openweights.models.forward import base_model, evaluating
from openweights.models.packing import last_hidden
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import Collator
from openweights.models.weights import WeightCopy

logger = logging.getLogger(__name__)

# Everyday requests of several kinds, none of which a narrow skill should touch.
EVERYDAY_PROMPTS = (
    "Why does bread rise in the oven?",
    "Write two sentences about a walk in the rain.",
    "Name five rivers in Africa.",
    "How do I find all files over 1 GB in a folder on Linux?",
    "Translate into French: The library opens at nine.",
    "What is the difference between a virus and a bacterium?",
    "A train leaves at 14:20 and arrives at 17:05. How long is the journey?",
    "Write a Python function that returns the second largest number of a list.",
    "My neighbour plays loud music at night. How could I bring it up?",
    "Summarise in a sentence what inflation is.",
    "Which is heavier, a litre of water or a litre of oil, and why?",
    "Suggest a name for a small bakery, and say why it fits.",
)
ANSWER_TOKENS = 32
EVERYDAY = "everyday"


class GateFollower(ScheduledCallback):
    """The teacher gate while the model trains; that of step 0 was the gate itself."""

    def __init__(
        self,
        gate: Gate,
        teacher: WeightCopy,
        showing: Showing,
        log_event: LogEvent,
        schedule: int | str,
    ) -> None:
        super().__init__(schedule, DOING, log_event, of=2 * len(gate.rows))
        self._gate = gate
        self._teacher = teacher
        self._showing = showing
        self._log_event = log_event

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The gate itself has measured."""

    def measure(self, model: Any, step: int) -> None:
        """A reward that fails now costs this measurement, and not the training."""
        try:
            event = self._gate.follow(self._teacher, self._showing, step)
        except JobFailedError as error:
            logger.warning("no teacher gate at step %d: %s", step, error)
        else:
            self._log_event(event.data())


class DistanceToBase(ScheduledCallback):
    """KL(base || model), the mean over the tokens of the base's own answers to everyday prompts.

    The model must have an adapter, without which it is the base. Its events have
    `tag="everyday"`.

    Args:
        engine: Answers, once, as the base.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: PreTrainedTokenizerBase,
        log_event: LogEvent,
        schedule: int | str,
    ) -> None:
        super().__init__(schedule, "comparing with the base", log_event)
        self._log_event = log_event
        collate = Collator(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
        asking = "answering everyday prompts as the base"
        with counted_stage(log_event, asking, of=len(EVERYDAY_PROMPTS), unit="answers"):
            self._batch = collate(_base_answers(engine, tokenizer))

    def measure(self, model: Any, step: int) -> None:
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self._batch.items()}
        scored = learned_positions(batch["labels"])
        with evaluating(model):
            hidden = last_hidden(base_model(model), batch)[scored]
            kl = kl_to_base(model, batch, hidden, scored).mean().item()
        self._log_event({"tag": EVERYDAY, "step": step, "kl_to_base": kl})


def _base_answers(
    engine: GenerationEngine, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """Each prompt with the base's greedy answer, whose tokens are the labels."""
    params = SamplingParams(temperature=0, max_new_tokens=ANSWER_TOKENS, detokenize=False)
    prompts = [
        prompt_token_ids(tokenizer, [{"role": "user", "content": text}])
        for text in EVERYDAY_PROMPTS
    ]
    completions = engine.generate([GenerationRequest(ids, params, None) for ids in prompts])
    answers = [list(own[0].token_ids) for own in completions]
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
