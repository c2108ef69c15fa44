"""Passes of a model whose layers are spread in nf4, and of one that has the same numbers as dense
matrices; the first rank saves both.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.jobs.unsloth.runtime.ranks_in_4bit
        MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from openweights.jobs.unsloth.runtime.ranks import join, leave
from openweights.models.forward import base_model
from openweights.models.fused.lora_linear import fuse_lora
from openweights.models.load import local_rank
from openweights.models.sharding import decoder_layers, spread_layers
from tests.jobs.unsloth.test_sdft import load, perturb


@torch.no_grad()
def round_to_4bit(model: nn.Module) -> None:
    """Give the frozen matrices of the layers the values that they have after nf4."""
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
        quantize_4bit,
    )

    for layer in decoder_layers(base_model(model)).modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            packed, state = quantize_4bit(
                layer.weight.data, compress_statistics=True, quant_type="nf4"
            )
            layer.weight.copy_(dequantize_4bit(packed, state))


def passes(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Loss and gradients of the adapter of the second of two equal passes."""
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(5, 45, device=device).view(2, 20)
    loss = torch.zeros(())
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
    return {**found, "loss": loss.detach().cpu()}


def main(model_folder: str, folder: str) -> None:
    join()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    spread, dense, other = (load(Path(model_folder)) for _ in range(3))
    for model in (spread, dense, other):
        perturb(model, 1)
    spread_layers(spread, device, in_4bit=True)
    fuse_lora(spread)
    round_to_4bit(dense.to(device))
    found = {name: passes(m, device) for name, m in (("spread", spread), ("dense", dense))}
    found["unrounded"] = passes(other.to(device), device)
    parts = [p.to_local() for p in spread.parameters() if isinstance(p, DTensor)]
    sizes = {
        "own_bytes": sum(part.numel() * part.element_size() for part in parts),
        "matrices": sum(
            p.numel()
            for p in decoder_layers(base_model(dense)).parameters()
            if p.dim() > 1 and not p.requires_grad
        ),
    }
    if distributed.get_rank() == 0:
        torch.save(found | {"sizes": sizes}, Path(folder) / "passes.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
