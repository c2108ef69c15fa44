"""How far a model has moved while it trains: in weights, in what it says, and along a direction.

Every N steps one event with `tag="monitoring"`:

- `weight_difference_norm`: Euclidean distance of the trained parameters from their first values;
- `kl_to_base`: mean over the answers' tokens of KL(base || model), where the base is the same
  network with its adapter switched off;
- `cosine`: mean over the same tokens of the cosine between a layer's hidden state and a direction,
  when there is one;
- `monitoring_s`: what measuring took.

Three of them go by the older runner's names, too: `weight_diff_norm`; `kl_vs_base`, which is
KL(model || base) over the same tokens; and `cos_sim`, with `cos_sim_plain` beside it: the cosine at
the last token of the rows' prompts, asked without a system text, before anything is answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
from openweights.jobs.unsloth.divergence import (
    Divergence,
    divergence_from_logits,
    linear_divergence,
)
from openweights.jobs.unsloth.runtime.reporting import LogEvent
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import (
    base_model,
    decoder_of,
    evaluating,
    frozen_head,
    output_logits,
)
from openweights.models.packing import last_hidden
from openweights.models.templates.messages import Message
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import Collator
from openweights.models.weights import WeightCopy


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
            moved = self._initial.distance()
            event |= {"weight_difference_norm": moved, "weight_diff_norm": moved}
            scored = [self._score(model, batch) for batch in self._batches]
            event["kl_to_base"], event["kl_vs_base"], cosine = (
                torch.cat(values).mean().item() for values in zip(*scored, strict=True)
            )
            if isinstance(self._direction, Tensor):
                event |= {"cosine": cosine, "cos_sim": cosine}
                event["cos_sim_plain"] = self._plain_cosine(model, self._direction)
        event["monitoring_s"] = time.perf_counter() - started
        self._log_event(event)

    def _score(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        """KL(base || model) and KL(model || base) of each learned token, and the cosine of the
        state that predicts it.
        """
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
        kinds = ("forward_kl", "reverse_kl")
        return [*base_divergences(model, batch, hidden, scored, kinds), cosine]

    def _plain_cosine(self, model: nn.Module, direction: Tensor) -> float:
        """Mean cosine of the state at the end of each prompt without a system text."""
        states = self._prompt_states(model)
        return torch.cosine_similarity(states, direction.to(states)[None], dim=-1).mean().item()

    def _contrast(self, model: nn.Module, first: str, second: str) -> Tensor:
        with evaluating(model):
            means = [self._prompt_states(model, system).mean(0) for system in (first, second)]
        difference = means[0] - means[1]
        return difference / difference.norm()

    def _prompt_states(self, model: nn.Module, system: str | None = None) -> Tensor:
        """Hidden state at the last token of each row's prompt, shape (rows, H), under a system
        prompt in place of its own.
        """
        base = base_model(model)
        device = next(model.parameters()).device
        told: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        found = []
        for row in self._rows:
            prompt, _ = split_row(row)
            turns: list[Message] = [m for m in prompt if m["role"] != "system"]
            ids = torch.tensor([prompt_token_ids(self._tokenizer, [*told, *turns])], device=device)
            with _layer_output(base, self._layer) as states:
                last_hidden(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            found.append(states[0][0, -1].float())
        return torch.stack(found)


def learned_positions(labels: Tensor) -> Tensor:
    """Where the next token is a label; shape (B, T)."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != -100
    return scored


def kl_to_base(model: Any, batch: Mapping[str, Tensor], hidden: Tensor, scored: Tensor) -> Tensor:
    """KL(base || model) at each scored position, shape (N,); see `base_divergences`."""
    return base_divergences(model, batch, hidden, scored, ["forward_kl"])[0]


def base_divergences(
    model: Any,
    batch: Mapping[str, Tensor],
    hidden: Tensor,
    scored: Tensor,
    kinds: Sequence[Divergence],
) -> list[Tensor]:
    """For each kind the divergence of the model, as student, from the base at each scored position,
    shape (N,); the base is the model without adapter.

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
        return [divergence_from_logits(logits, base_logits, kind) for kind in kinds]
    with model.disable_adapter():
        base_hidden = last_hidden(base, batch)[scored]
    weights = torch.ones(len(hidden), device=hidden.device)
    return [linear_divergence(hidden, base_hidden, head, weights, kind).per_token for kind in kinds]


@contextmanager
def _layer_output(base: Any, layer: int) -> Iterator[list[Tensor]]:
    """What one decoder layer puts out inside this context, one entry a forward."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_of(base).layers[layer].register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
