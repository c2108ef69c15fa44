"""Uneven work on one GPU: prompts of 50 to 1,500 tokens, answers of 10 to 512, forced to end there.

    python -m tests.benchmarks.uneven [--requests 512] [--peers 64] [--json F]

A model of a 7 B model's shape with random weights, without adapters, which the peers' fastest paths
do not compute. `generate` completes batches of 32 in their order, each as long as its longest
answer; transformers' continuous batching is told each request's own length. They are given the
first `--peers` requests only, since they take long; all figures are tokens of answers a second.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.models.tokens import pad_left
from tests.benchmarks.models import PAD, byte_tokenizer, qwen_7b

Work = list[tuple[list[int], int]]


def uneven(count: int) -> Work:
    """Prompts and the lengths of their answers."""
    draw = random.Random(0)
    return [
        ([draw.randrange(256) for _ in range(draw.randint(50, 1500))], draw.randint(10, 512))
        for _ in range(count)
    ]


def ours(model: Any, rows: int) -> Callable[[Work], None]:
    engine = CudaGraphEngine(model, byte_tokenizer(), rows=rows)

    def complete(work: Work) -> None:
        requests = [
            GenerationRequest(
                prompt,
                SamplingParams(
                    max_new_tokens=length, stop_token_ids=(), detokenize=False, seed=index
                ),
            )
            for index, (prompt, length) in enumerate(work)
        ]
        for (_, length), own in zip(work, engine.generate(requests), strict=True):
            assert len(own[0].token_ids) == length

    return complete


@torch.no_grad()
def by_generate(model: Any) -> Callable[[Work], None]:
    def complete(work: Work) -> None:
        for start in range(0, len(work), 32):
            part = work[start : start + 32]
            ids, mask = pad_left([prompt for prompt, _ in part], PAD, model.device)
            longest = max(length for _, length in part)
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                min_new_tokens=longest,
                max_new_tokens=longest,
                do_sample=True,
                top_k=0,
            )

    return complete


def by_continuous_batching(model: Any) -> Callable[[Work], None]:
    def complete(work: Work) -> None:
        config = GenerationConfig(
            do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=PAD, max_new_tokens=512
        )
        manager = model.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            for index, (prompt, length) in enumerate(work):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            left = len(work)
            while left:
                result = manager.get_result(timeout=60)
                assert result is not None, "continuous batching stopped"
                left -= bool(result.is_finished())
        finally:
            manager.stop(block=True)

    return complete


def measure(name: str, complete: Callable[[Work], None], work: Work) -> dict[str, Any]:
    """Of one call, after a short one that compiles."""
    complete(work[:8])
    torch.cuda.synchronize()
    started = time.perf_counter()
    complete(work)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = sum(length for _, length in work)
    return {
        "name": name,
        "requests": len(work),
        "s": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = qwen_7b().eval()
    work = uneven(options.requests)
    few = work[: options.peers]
    runs: list[tuple[str, Callable[[Any], Callable[[Work], None]], Work]] = [
        ("cuda_graph, 32 rows", lambda m: ours(m, 32), work),
        ("cuda_graph, 128 rows", lambda m: ours(m, 128), work),
        ("cuda_graph, 32 rows", lambda m: ours(m, 32), few),
        ("generate, batches of 32", by_generate, few),
        ("continuous batching", by_continuous_batching, few),
    ]
    results: list[dict[str, Any]] = []
    for name, make, part in runs if options.peers else runs[:2]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results.append(measure(name, make(model), part))
        print(results[-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
