"""Trainers whose loss is an exact mean over an optimizer step.

A batch has `item_counts`: how many items each of its rows holds, such as pairs, or tokens by their
weight. The loss is the sum over the items of all micro-batches and ranks, divided by their number,
so that how a step is split into micro-batches and ranks changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from openweights.jobs.unsloth.runtime.ranks import average_gradients, sum_over_ranks
from openweights.models.forward import evaluating
from openweights.models.packing import repacked
from openweights.models.sharding import is_spread, most_on_a_rank, one_token
from openweights.models.weights import keeping_precision


@dataclass(frozen=True, slots=True)
class SummedLoss:
    """The loss of a batch.

    Attributes:
        total: Its sum over the items.
        metrics: Further sums over the items by name, to be logged as means.
    """

    total: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


LossFunction = Callable[[Any, Mapping[str, Tensor]], SummedLoss]


# A micro-batch whose rows were laid into others of its step.
_NO_ROWS: dict[str, Any] = {"input_ids": torch.empty(1, 0, dtype=torch.long)}


# A micro-batch that only other ranks have, which need this one's parts of the layers.
_ROWS_ELSEWHERE: dict[str, Any] = {"input_ids": torch.empty(1, 0, dtype=torch.long)}


class ExactMeanTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is a part of the step's mean, and whose logs hold means, too.

    Args:
        **kwargs: Of `SFTTrainer`.

    Attributes:
        scoring_passes: Passes without gradient that come before a micro-batch's own.
    """

    scoring_passes = 0

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        self._is_spread = is_spread(model)
        if self._is_spread:
            # Ranks are kept in step here; accelerate would wrap it into DDP, and refuse.
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        with keeping_precision(model):
            super().__init__(model=model, **kwargs)  # type: ignore[arg-type]
        self._network = model
        # By name; what an evaluation recorded begins with "eval_".
        self._sums: dict[str, tuple[float | Tensor, float | Tensor]]
        self._sums = defaultdict(lambda: (0.0, 0.0))
        # Of how much the loss since the last log is a mean.
        self._counted: float | Tensor = 0.0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: trl would write one at each checkpoint, and a result has its own (`model_card`)."""

    def _filled_up(self, packs: Sequence[Any], count: int) -> list[Any]:
        """So many micro-batches: packs, and before them empty ones, which are passed by.

        The Trainer counts on the number that it asked for, and takes its step after the last. Where
        layers are spread, a rank has something to do as often as the others.
        """
        most = most_on_a_rank(len(packs)) if self._is_spread else len(packs)
        elsewhere = [_ROWS_ELSEWHERE] * (most - len(packs))
        return [_NO_ROWS] * (count - most) + elsewhere + list(packs)

    def _share(self, loss: Tensor) -> Tensor:
        """The loss to return for a micro-batch's part of the step's mean over all ranks."""
        # Gradients are averaged over ranks, and each rank holds its share of the sum.
        loss = loss * self.accelerator.num_processes
        if not self.model_accepts_loss_kwargs:
            # The Trainer divides by the number of micro-batches then; the mean has done so.
            loss = loss * self.current_gradient_accumulation_steps
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """A micro-batch; nothing for one whose rows others took over.

        The loss does not pass through DDP's forward, so the last one of a step averages the
        gradients over the ranks here.
        """
        if inputs is _ROWS_ELSEWHERE:
            self._take_part()
        if inputs is _NO_ROWS or inputs is _ROWS_ELSEWHERE:
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average_gradients(self._network, self.accelerator)
        return loss

    def _take_part(self) -> None:
        """The passes of a micro-batch, on one token that teaches nothing; without dropout, whose
        random numbers are for those that teach.
        """
        with evaluating(self._network), self.accelerator.autocast():
            for _ in range(self.scoring_passes):
                one_token(self._network)
        self._network.eval()
        with self.accelerator.autocast():
            hidden = one_token(self._network)
        (hidden.sum() * 0).backward()
        self._network.train()

    def _record(self, name: str, amount: float | Tensor, weight: float | Tensor) -> None:
        """Tensors stay on their device until they are logged: reading one waits for the GPU."""
        total, total_weight = self._sums[name]
        self._sums[name] = (total + amount, total_weight + weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the weighted means of what was recorded since the last log.

        A mean of nothing is left out, the loss itself, too: 0 would say that all is perfect.
        """
        kind = "eval_" if "eval_loss" in logs else ""
        is_due = f"{kind}loss" in logs
        if "loss" in logs:
            counted, self._counted = float(self._counted), 0.0
            if not sum_over_ranks(counted, self.accelerator):
                del logs["loss"]
        names = [name for name in self._sums if name.startswith("eval_") == bool(kind)]
        if names and is_due:
            sums = [tuple(map(float, self._sums.pop(name))) for name in names]
            totals = sum_over_ranks(sums, self.accelerator)
            for name, (total, weight) in zip(names, totals, strict=True):
                logs.pop(name, None)
                if weight:
                    logs[name] = total / weight
        super().log(logs, start_time)


class StepMeanTrainer(ExactMeanTrainer):
    """`SFTTrainer` with a loss of its own.

    Args:
        summed_loss: The loss of a batch, from the unwrapped model and the batch.
        micro_batch_tokens: For a collator that packs rows: those of a step are laid into
            micro-batches of so many tokens. None leaves the batches as the collator makes them.
        **kwargs: Of `SFTTrainer`; the collator's batches have `item_counts`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        summed_loss: LossFunction,
        micro_batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self._summed_loss = summed_loss
        self._micro_batch_tokens = micro_batch_tokens

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and how many items they have over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [batch["item_counts"].sum() for batch in batches]
        count = float(torch.stack(counts).sum()) if counts else 0.0
        return self._repacked(batches), sum_over_ranks(count, self.accelerator)

    def _repacked(self, batches: list[Any]) -> list[Any]:
        """The same rows in fewer batches."""
        if self._micro_batch_tokens is None or not batches:
            return batches
        return self._filled_up(repacked(batches, self._micro_batch_tokens), len(batches))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The batch's part of the step's mean; its own mean in an evaluation."""
        with self.accelerator.autocast():
            summed = self._summed_loss(self._network, inputs)
        items = inputs["item_counts"].sum()
        for name, value in summed.metrics.items():
            self._record(name if self._network.training else f"eval_{name}", value, items)
        # Where no item counts, as when all weights are 0, the sum is 0, and so is the mean.
        if num_items_in_batch is None:
            # The Trainer would weigh batches by their rows.
            self._record("eval_loss", summed.total.detach(), items)
            loss = summed.total / items.clamp(min=torch.finfo(items.dtype).tiny)
        else:
            self._counted = self._counted + items
            loss = self._share(summed.total / (num_items_in_batch or 1.0))
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a test batch; there is nothing else to predict."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None
