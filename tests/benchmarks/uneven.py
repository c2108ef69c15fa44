"""Uneven work on one GPU: prompts of 50 to 1,500 tokens, answers of 10 to 512, forced to end there.

    python -m tests.benchmarks.uneven [--requests 512] [--peers 64] [--vllm 128] [--json F]

A model of a 7 B model's shape with random weights, without adapters, which the peers' fastest paths
do not compute. `generate` completes batches of 32 in their order, each as long as its longest
answer; transformers' continuous batching is told each request's own length. They are given the
first `--peers` requests only, since they take long. With `--vllm` vLLM, in a process of its own and
where it is installed, is given all of them, to grow so many at a time; nothing else is measured
then. All figures are tokens of answers a second.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.models.tokens import pad_left
from tests.benchmarks.models import PAD, byte_tokenizer, qwen_7b, shape

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


def by_vllm(rows: int, folder: Path) -> Callable[[Work], None]:
    """Random weights of the same shape, made by vLLM itself; its defaults, no tokenizer."""
    from vllm import LLM, SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

    shape().save_pretrained(folder)
    llm: Any = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=rows,
        gpu_memory_utilization=0.6,
    )

    def complete(work: Work) -> None:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in work]
        params = [
            SamplingParams(
                max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False, seed=None
            )
            for _, length in work
        ]
        found = llm.generate(prompts, params, use_tqdm=False)
        for (_, length), own in zip(work, found, strict=True):
            assert len(own.outputs[0].token_ids) == length

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
    parser.add_argument("--vllm", type=int, default=0, help="rows; 0 leaves vLLM out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = uneven(options.requests)
    if options.vllm:
        with tempfile.TemporaryDirectory() as folder:
            complete = by_vllm(options.vllm, Path(folder))
            result = measure(f"vLLM, {options.vllm} rows", complete, work)
        print(result, flush=True)
        if options.json:
            options.json.write_text(json.dumps([result], indent=2))
        return
    model = qwen_7b().eval()
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
