"""Several processes, one for each GPU (`launcher.py`): what they tell each other.

Gradients, the number of sequences in a step and what is logged are summed over all of them, so a
step equals that of one process with all rows, to rounding, whoever has which of them. So SDFT and
GRPO deal the rows of a step anew: to be sampled by how long completions may become, and, once they
are there, to be scored by how long they are (`even_shares`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from openweights.jobs.unsloth.config.vram import must_spread
from openweights.jobs.unsloth.runtime.launcher import launched_ranks
from openweights.jobs.unsloth.validate import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

LOADING = timedelta(hours=1)  # of a large model by the first rank, for which the others wait
GLOO_REST_S = 0.5  # for threads that have nothing left to do but to end


def sum_over_ranks(value: Any, accelerator: Accelerator) -> Any:
    """Numbers, or nested lists of them, summed over all ranks in float64; in the shape given."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def world_size() -> int:
    """How many processes train together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on some rank; every rank must ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(tensor)
    return bool(tensor)


def first_ranks(value: Any) -> Any:
    """What the first rank has; every rank must ask."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def of_all_ranks(value: T) -> list[T]:
    """What each rank has, in their order; every rank must ask."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rows_of_step(batches: Sequence[Sequence[T]]) -> list[T]:
    """The rows of all ranks in the order in which one process would have them.

    Args:
        batches: Of this rank: its rows of each micro-batch. Every rank must ask.
    """
    ranks = of_all_ranks(batches)
    return [row for micro in zip(*ranks, strict=True) for batch in micro for row in batch]


def own_share(sizes: Sequence[float]) -> list[int]:
    """This rank's rows, of rows of these sizes: `even_shares`."""
    number = torch.distributed.get_rank() if world_size() > 1 else 0
    return even_shares(sizes, world_size())[number]


def even_shares(sizes: Sequence[float], ranks: int) -> list[list[int]]:
    """Rows for each rank, by their indices, the largest first: nearly the same sum of sizes, and
    the same number of rows, or one less.

    In order of size, as many rows as there are ranks are dealt at a time, the largest of them to
    the rank that has least. Two sums then differ by no more than two rows that were dealt at the
    same time do, so not by more than the largest row and the smallest.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    by_size = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    for start in range(0, len(by_size), ranks):
        lightest = sorted(range(ranks), key=lambda number: sums[number])
        for number, row in zip(lightest, by_size[start : start + ranks], strict=False):
            shares[number].append(row)
            sums[number] += sizes[row]
    return shares


def shares_layers(config: TrainingConfig) -> bool:
    """Whether the ranks are to have parts of one model, instead of a model each.

    Args:
        config: With the base of its model as `model`.
    """
    gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    memory = min((gpu.total_memory for gpu in gpus), default=2**62)
    return must_spread(config, launched_ranks(), memory)


def join() -> None:
    """Become one of the group, before the Trainer would, for a model that is loaded together."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=LOADING)


def leave() -> None:
    """End the process group in good order: threads of its own that are left when Python ends may
    abort the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_backend() == "gloo":
            # Its threads need Python to let go of the last message, and are then waited for by a
            # main thread that keeps Python to itself: both would wait for ever.
            time.sleep(GLOO_REST_S)
        torch.distributed.destroy_process_group()


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Mean over ranks of every trainable parameter's gradient, in one message for each type."""
    if accelerator.num_processes == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in {p.dtype for p in parameters}:
        gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
