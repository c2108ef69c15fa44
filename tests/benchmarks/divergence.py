"""Forward and backward of the linear divergences against liger-kernel's chunked JSD, on one GPU.

    python -m tests.benchmarks.divergence [--tokens 8192 --hidden 4096 --vocabulary 128256]

Both get the same bf16 hidden states and head, in one process. Memory is the peak above the inputs.
The floor counts the three matrix products (student, teacher, gradient) at the rate that a large
bf16 product reaches on this device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from openweights.jobs.unsloth.divergence import Divergence, linear_divergence
from openweights.models.forward import Head

Figures = dict[str, float | str | None]


def measure(name: str, call: Callable[[], object], repeats: int = 10) -> Figures:
    """Median milliseconds and peak GiB above what is allocated before the call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"what": name, "ms": round(sorted(times)[repeats // 2], 2), "gib": round(peak, 2)}


def ours(student: Tensor, teacher: Tensor, weight: Tensor, kind: Divergence) -> Callable[[], None]:
    """Forward and backward of ours."""
    weights = torch.full((len(student),), 1 / len(student), device=student.device)

    def call() -> None:
        student.grad = None
        linear_divergence(student, teacher, Head(weight), weights, kind).loss.backward()

    return call


def liger(student: Tensor, teacher: Tensor, weight: Tensor, beta: float) -> Callable[[], None]:
    """Forward and backward of liger's; its head gradient cannot be switched off."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)

    def call() -> None:
        student.grad = None
        loss(student, weight, teacher, weight, labels).backward()

    return call


def floor_ms(tokens: int, hidden: int, vocabulary: int) -> float:
    """Three products at the measured rate of an 8192-cube bf16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / (float(measure("", lambda: a @ b)["ms"] or 0) / 1e3)
    return 3 * 2 * tokens * hidden * vocabulary / rate * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = (options.tokens, options.hidden)
    random = {"device": "cuda", "dtype": torch.bfloat16}
    student = torch.randn(*shape, **random).requires_grad_()
    teacher = torch.randn(*shape, **random)
    weight = torch.randn(options.vocabulary, options.hidden, **random) * 0.02
    floor = floor_ms(options.tokens, options.hidden, options.vocabulary)
    rows = [
        measure(f"ours {kind}", ours(student, teacher, weight, kind))
        for kind in ("reverse_kl", "forward_kl", "jsd")
    ]
    try:
        rows += [
            measure(f"liger chunked JSD beta={beta}", liger(student, teacher, weight, beta))
            for beta in (0.5, 1.0)
        ]
    except ImportError:
        print("liger-kernel is not installed; ours only")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(options)}")
    print(f"floor: {floor:.1f} ms for three matrix products")
    for row in rows:
        print(f"{row['what']!s:28} {row['ms']:8} ms {row['gib']:8} GiB")
    if options.json:
        options.json.write_text(json.dumps({"floor_ms": floor, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
