"""How far a model has moved while it trains: in weights, in what it says, and along a direction.

Every N steps one event with `tag="monitoring"`:

- `weight_difference_norm`: Euclidean distance of the trained parameters from their first values;
- `kl_to_base`: mean over the answers' tokens of KL(base || model), where the base is the same
  network with its adapter switched off;
- `cosine`: mean over the same tokens of the cosine between a layer's hidden state and a direction,
  when there is one;
- `monitoring_s`: what measuring took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from openweights.jobs.unsloth.config.demonstrations import split_row
from openweights.jobs.unsloth.data import sft_examples
from openweights.jobs.unsloth.divergence import divergence_from_logits, linear_divergence
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model, evaluating, frozen_head, output_logits
from openweights.models.template import Message, prompt_token_ids
from openweights.models.tokens import Collator
from openweights.models.weights import WeightCopy

LogEvent = Callable[[dict[str, Any]], None]


class MonitoringCallback(TrainerCallback):
    """Measures on a fixed set of conversations; training itself is not changed by it.

    Args:
        config: Of the job; says how conversations are rendered and cut.
        rows: `conversations` rows, whose answers are scored.
        log_event: Receives the events.
        every_steps: At step 0 and then so often.
        layer: Index of the decoder layer whose output is compared with `direction`.
        direction: A vector of shape (H,), or two contrasting system prompts: the direction is then
            the normalised difference of the mean hidden states after the rows' prompts under the
            first and under the second, measured at step 0.
    """

    def __init__(
        self,
        config: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Mapping[str, Any]],
        log_event: LogEvent,
        *,
        every_steps: int = 10,
        layer: int = -1,
        direction: Tensor | tuple[str, str] | None = None,
        batch_size: int = 8,
    ) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._log_event = log_event
        self._every_steps = every_steps
        self._layer = layer
        self._direction = direction
        examples = sft_examples(config, tokenizer, rows)
        collate = Collator(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
        starts = range(0, len(examples), batch_size)
        self._batches = [collate(examples[start : start + batch_size]) for start in starts]
        self._initial: WeightCopy | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the first weights and find the direction: a resumed run loads others later."""
        model = kwargs["model"]
        self._initial = WeightCopy(model)
        if isinstance(self._direction, tuple):
            self._direction = self._contrast(model, *self._direction)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, at step 0."""
        if self._initial is None:
            self.on_init_end(args, state, control, **kwargs)
        if state.global_step == 0:
            self._measure(kwargs["model"], 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every_steps == 0:
            self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: nn.Module, step: int) -> None:
        started = time.perf_counter()
        event: dict[str, Any] = {"tag": "monitoring", "step": step}
        with evaluating(model):
            assert self._initial is not None
            event["weight_difference_norm"] = self._initial.distance()
            divergences, cosines = zip(*(self._score(model, b) for b in self._batches), strict=True)
        event["kl_to_base"] = torch.cat(divergences).mean().item()
        if self._direction is not None:
            event["cosine"] = torch.cat(cosines).mean().item()
        event["monitoring_s"] = time.perf_counter() - started
        self._log_event(event)

    def _score(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """KL(base || model) of each learned token, and the cosine of the state that predicts it."""
        base = base_model(model)
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        scored = learned_positions(batch["labels"])
        with _layer_output(base, self._layer) as states:
            hidden = last_hidden(base, batch)[scored]
        cosine = hidden.new_zeros(0)
        if isinstance(self._direction, Tensor):
            direction = self._direction.to(device, torch.float32)
            cosine = torch.cosine_similarity(states[0][scored].float(), direction[None], dim=-1)
        return kl_to_base(model, batch, hidden, scored), cosine

    def _contrast(self, model: nn.Module, first: str, second: str) -> Tensor:
        with evaluating(model):
            difference = self._mean_state(model, first) - self._mean_state(model, second)
        return difference / difference.norm()

    def _mean_state(self, model: nn.Module, system: str) -> Tensor:
        """Mean hidden state at the last token of the rows' prompts under a system prompt."""
        base = base_model(model)
        device = next(model.parameters()).device
        total = []
        for row in self._rows:
            prompt, _ = split_row(row)
            turns: list[Message] = [m for m in prompt if m["role"] != "system"]
            messages: list[Message] = [{"role": "system", "content": system}, *turns]
            ids = torch.tensor([prompt_token_ids(self._tokenizer, messages)], device=device)
            with _layer_output(base, self._layer) as states:
                last_hidden(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            total.append(states[0][0, -1].float())
        return torch.stack(total).mean(0)


def learned_positions(labels: Tensor) -> Tensor:
    """Where the next token is a label; shape (B, T)."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != -100
    return scored


def kl_to_base(model: Any, batch: Mapping[str, Tensor], hidden: Tensor, scored: Tensor) -> Tensor:
    """KL(base || model) at each scored position, shape (N,); the base is the model without adapter.

    Args:
        batch: `input_ids` and `attention_mask`, shape (B, T).
        hidden: The model's last hidden states at the scored positions, shape (N, H).
        scored: Which positions, shape (B, T).
    """
    base = base_model(model)
    head = frozen_head(base)
    if head is None:
        logits = output_logits(base, hidden)
        with model.disable_adapter():
            base_logits = output_logits(base, last_hidden(base, batch)[scored])
        return divergence_from_logits(logits, base_logits, "forward_kl")
    with model.disable_adapter():
        base_hidden = last_hidden(base, batch)[scored]
    weights = torch.ones(len(hidden), device=hidden.device)
    return linear_divergence(hidden, base_hidden, head, weights, "forward_kl").per_token


def last_hidden(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states, shape (B, T, H)."""
    return base.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state


@contextmanager
def _layer_output(base: Any, layer: int) -> Iterator[list[Tensor]]:
    """What one decoder layer puts out inside this context, one entry a forward."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = base.get_decoder().layers[layer].register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
