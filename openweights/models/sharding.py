"""A base model whose layers are spread over the GPUs of several processes (FSDP2 of torch).

Of the matrices of each layer a rank keeps its part, `fully_shard` gathers a layer when it computes
and lets go of it afterwards (Zhao et al., arXiv 2304.11277). Whole on every rank stay the
embeddings and the head, from which losses read, the small vectors, and what is trained: adapters
are averaged over ranks as they are without sharding, so that optimizer, teacher, checkpoints and
results are those of one process, and a run of two goes on in one.

To gather a layer takes all ranks. They must make the same passes, or have gathered all layers
before, as `own_passes` sees to where one has more to sample than another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from openweights.errors import ConfigError
from openweights.models.forward import base_model, decoder_of, evaluating
from openweights.models.memory import memory_bytes

SPARE = 0.25  # of a rank's memory, for the cache and what a pass holds


def spread_layers(model: nn.Module, device: torch.device, *, in_4bit: bool = False) -> None:
    """Move a model to the devices of all ranks, a layer at a time, each rank with its part.

    No device ever holds more than its parts, what stays whole, and one layer.

    Args:
        model: With its adapter. On the first rank it has its weights, on the CPU; on the others it
            may be on the meta device.
        device: Of this rank; the process group is initialised.
        in_4bit: Quantise the layers' matrices to nf4, each rank the same ones.

    Raises:
        ConfigError: The architecture has no list of layers.
    """
    base = base_model(model)
    base.tie_weights()
    decoder = decoder_of(base)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in decoder_layers(base):
        _place(layer, device)
        if in_4bit:
            _quantise(layer)
        whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}  # noqa: PLR2004
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    _place(model, device)
    rest = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=rest)


def decoder_layers(base: Any) -> nn.ModuleList:
    """The layers of a causal language model.

    Raises:
        ConfigError: It has no list of them.
    """
    for child in decoder_of(base).children():
        if isinstance(child, nn.ModuleList):
            return child
    raise ConfigError(
        f"parallel: the layers of a {type(base).__name__} cannot be spread over GPUs; use "
        "parallel='ddp', or another model"
    )


def is_spread(model: nn.Module) -> bool:
    """Whether the model's layers are spread over several devices."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def own_passes(model: nn.Module) -> Iterator[None]:
    """Ranks may make different numbers of passes without gradient inside. Nothing for a model that
    is not spread.

    Where every rank has room for all layers they are gathered once, and let go of at the end. Else
    they are gathered for each pass, in which ranks take part that have made all of their own.
    """
    if not is_spread(model):
        yield
        return
    with _gathered(model) if _all_have_room(model) else _taking_turns(model):
        yield


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Inside, all layers are whole on every rank, and a pass takes no other."""
    decoder: Any = decoder_of(base_model(model))
    decoder.set_reshard_after_forward(False)
    try:
        with evaluating(model):
            one_token(model)  # which leaves behind what it gathers
        yield
    finally:
        decoder.set_reshard_after_forward(True)
        for layer in decoder_layers(base_model(model)):
            layer.reshard()  # type: ignore[operator]


@contextmanager
def _taking_turns(model: nn.Module) -> Iterator[None]:
    """Whoever has made its own passes takes part in those of the others, to the last."""
    decoder = decoder_of(base_model(model))
    device = next(model.parameters()).device

    def announce(*_: Any) -> None:
        _busy_ranks(1, device)

    handle = decoder.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        while _busy_ranks(0, device).item():
            with evaluating(model):
                one_token(model)


def _all_have_room(model: nn.Module) -> bool:
    """Whether the memory of every rank holds all layers, and `SPARE` of it beside them."""
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    elsewhere = sum((p.numel() - p.to_local().numel()) * p.element_size() for p in parts)
    free, whole = memory_bytes()
    if parts[0].device.type == "cuda":
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free //= distributed.get_world_size()
    return not most_on_a_rank(int(free - elsewhere < SPARE * whole))


def one_token(model: nn.Module) -> Tensor:
    """The shortest pass through all layers, for the sake of ranks that need theirs gathered."""
    decoder = decoder_of(base_model(model))
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    return decoder(input_ids=ids, use_cache=False).last_hidden_state


def most_on_a_rank(count: int) -> int:
    """The largest count that a rank has; every rank must ask."""
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(count, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def _busy_ranks(own: int, device: torch.device) -> Tensor:
    count = torch.full((), own, device=device)
    distributed.all_reduce(count)
    return count


@torch.no_grad()
def _place(root: nn.Module, device: torch.device) -> None:
    """Parameters and buffers with the values of the first rank, on `device`.

    A tensor that has several names keeps them. Parts of layers are where they belong already.
    """
    placed: dict[int, Tensor] = {}
    for module in root.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in placed:
                    placed[id(tensor)] = _of_the_first_rank(tensor, device)
                tensors[name] = placed[id(tensor)]  # type: ignore[assignment]


def _of_the_first_rank(tensor: Tensor, device: torch.device) -> Tensor:
    has_values = distributed.get_rank() == 0
    values = tensor.detach().to(device) if has_values else torch.empty_like(tensor, device=device)
    distributed.broadcast(values, src=0)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _quantise(layer: nn.Module) -> None:
    """Its linear layers in nf4, in the type that they compute in, as which they can be gathered.

    The scales of the blocks stay whole, with the layer.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    for parent in list(layer.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or linear.weight.requires_grad:
                continue
            storage = linear.weight.dtype
            options: dict[str, Any] = {
                "compress_statistics": True, "quant_type": "nf4", "quant_storage": storage,
            }  # fmt: skip
            new = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None,
                compute_dtype=storage, device="meta", **options,
            )  # fmt: skip
            packed = Params4bit(linear.weight.data, module=new, **options)._quantize(
                linear.weight.device
            )
            new.weight = nn.Parameter(packed.data, requires_grad=False)
            new.bias = linear.bias
            setattr(parent, name, new)
