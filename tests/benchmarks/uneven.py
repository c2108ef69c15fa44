"""Uneven work on one GPU: prompts of 50 to 1,500 tokens, answers of 10 to 512, forced to end there.

    python -m tests.benchmarks.uneven [--requests 512] [--rows 32 128] [--peers 64] [--json F]
    python -m tests.benchmarks.uneven --rows --generate 128 --continuous 128 --peers 128
    python -m tests.benchmarks.uneven --vllm 128 [--requests 512] [--json F]

A model of a 7 B model's shape with random weights, without adapters, which the peers' fastest paths
do not compute. All figures are tokens of answers a second, the time of the prompts included, after
other work of the same kind that captures and compiles (`first_s`).

The peers take long, and complete the first `--peers` requests: `generate` in batches of
`--generate`, each as long as its longest answer; transformers' continuous batching with
`--continuous` rows is told each request's own length, and is stopped after a minute. `--vllm`
gives vLLM, where it is installed, all requests, to grow so many at a time; nothing else is
measured then.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from openweights.generation.cuda.graph_engine import CudaGraphEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.models.tokens import pad_left
from tests.benchmarks.models import PAD, byte_tokenizer, qwen_7b, shape

Work = list[tuple[list[int], int]]
Complete = Callable[[Work], int]  # returns how many tokens of answers there are

PEER_SECONDS = 60.0  # after which continuous batching is stopped
WARM_PEERS, WARM_TOKENS = 8, 4  # what compiles for the peers: so many requests and tokens of each


def uneven(count: int, seed: int = 0) -> Work:
    """Prompts and the lengths of their answers."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(256) for _ in range(draw.randint(50, 1500))], draw.randint(10, 512))
        for _ in range(count)
    ]


def ours(model: Any, rows: int) -> Complete:
    engine = CudaGraphEngine(model, byte_tokenizer(), rows=rows)

    def complete(work: Work) -> int:
        requests = [
            GenerationRequest(
                prompt,
                SamplingParams(
                    max_new_tokens=length, stop_token_ids=(), detokenize=False, seed=index
                ),
            )
            for index, (prompt, length) in enumerate(work)
        ]
        return sum(len(own[0].token_ids) for own in engine.generate(requests))

    return complete


def by_generate(model: Any, rows: int) -> Complete:
    @torch.no_grad()
    def complete(work: Work) -> int:
        for start in range(0, len(work), rows):
            part = work[start : start + rows]
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
        return tokens_of(work)

    return complete


def by_continuous_batching(model: Any, rows: int) -> Complete:
    """Without graphs and with small batches: attention without FlashAttention's package makes a
    mask of all tokens of a batch times all that are cached.
    """
    config = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=PAD, max_new_tokens=512
    )
    settings = ContinuousBatchingConfig(
        num_blocks=8 * rows,  # of 256 tokens
        max_batch_tokens=1024,
        max_requests_per_batch=rows,
        max_memory_percent=0.5,
        use_cuda_graph=False,
    )

    def complete(work: Work) -> int:
        manager = model.init_continuous_batching(config, settings)
        grown: dict[str, int] = {}
        deadline = time.monotonic() + PEER_SECONDS
        manager.start()
        try:
            for prompt, length in work:
                manager.add_request(prompt, max_new_tokens=length, streaming=True)
            left = len(work)
            while left and time.monotonic() < deadline:
                result = manager.get_result(timeout=1)
                if result is not None:
                    assert result.error is None, result.error
                    grown[result.request_id] = len(result.generated_tokens)
                    left -= bool(result.is_finished())
        finally:
            manager.stop(block=True, hard_stop=True)
        return sum(grown.values())

    return complete


def by_vllm(rows: int, folder: Path) -> Complete:
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

    def complete(work: Work) -> int:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in work]
        params = [
            SamplingParams(
                max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False, seed=None
            )
            for _, length in work
        ]
        found = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(own.outputs[0].token_ids) for own in found)

    return complete


def tokens_of(work: Work) -> int:
    return sum(length for _, length in work)


def timed(complete: Complete, work: Work) -> tuple[int, float]:
    """Tokens and seconds of a call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    tokens = complete(work)
    torch.cuda.synchronize()
    return tokens, time.perf_counter() - started


def measure(name: str, complete: Complete, before: Work, work: Work) -> dict[str, Any]:
    """Of one call, after one with other work, which captures and compiles."""
    _, first_s = timed(complete, before)
    tokens, seconds = timed(complete, work)
    assert tokens == tokens_of(work) or seconds > PEER_SECONDS, "an answer has another length"
    return {
        "name": name,
        "requests": len(work),
        "first_s": round(first_s, 2),
        "s": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--peers", type=int, default=64, help="requests; 0 leaves them out")
    parser.add_argument("--generate", type=int, nargs="*", default=[32], help="rows of a batch")
    parser.add_argument("--continuous", type=int, nargs="*", default=[32], help="rows at a time")
    parser.add_argument("--vllm", type=int, default=0, help="rows; 0 leaves vLLM out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name, make, before, work in runs(options):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results.append(measure(name, make(), before, work))
        print(results[-1], flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2))


def runs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Complete], Work, Work]]:
    """Name, what completes, what is completed before, and what is measured."""
    work, before = uneven(options.requests), uneven(max(options.requests // 2, 1), seed=1)
    rows = options.vllm
    if rows:
        with tempfile.TemporaryDirectory() as folder:
            yield f"vLLM, {rows} rows", lambda: by_vllm(rows, Path(folder)), before, work
        return
    model = qwen_7b().eval()
    for rows in options.rows:
        yield f"cuda_graph, {rows} rows", partial(ours, model, rows), before, work
    if options.peers:
        few = work[: options.peers]
        short = [(prompt, WARM_TOKENS) for prompt, _ in before[:WARM_PEERS]]
        for rows in options.continuous:
            peer = partial(by_continuous_batching, model, rows)
            yield f"continuous batching, {rows} rows", peer, short, few
        for rows in options.generate:
            yield f"generate, batches of {rows}", partial(by_generate, model, rows), short, few


if __name__ == "__main__":
    main()
