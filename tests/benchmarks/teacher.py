"""EMA update and both weight swaps of the teacher, for adapters of 80 M parameters, on one GPU.

    python -m tests.benchmarks.teacher [--dtype float32]

The parameters have the shapes of a LoRA of rank 32 on all linear layers of a 7 B model.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from openweights.jobs.unsloth.teacher import EMATeacher

HIDDEN, MLP, KV, LAYERS, RANK = 3584, 18_944, 512, 28, 32
SHAPES = [
    *[(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN)],
    *[(HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)],
]


def adapters(dtype: torch.dtype) -> nn.Module:
    layer = [
        nn.Parameter(torch.randn(*shape, device="cuda", dtype=dtype))
        for _ in range(LAYERS)
        for inputs, outputs in SHAPES
        for shape in ((RANK, inputs), (outputs, RANK))
    ]
    return nn.ParameterList(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    model = adapters(getattr(torch, parser.parse_args().dtype))
    teacher = EMATeacher(model, 0.02)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with teacher.acting():
            pass
        teacher.update()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    median = sorted(times)[10]
    print(f"{torch.cuda.get_device_name()}, {count:.1f} M parameters: {median:.2f} ms")


if __name__ == "__main__":
    main()
