"""Rollout engines side by side on a model of a 7 B model's shape with random weights, on one GPU.

    python -m tests.benchmarks.rollout [--batch 32 --prompt 200 --new 256]
        [--engines cuda_graph transformers] [--precision fp8] [--json F]

The floor is the time to read the weights, and the keys and values of the mean length, once a token
at the rate of a large device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openweights.generation.choose import generation_engine
from openweights.generation.params import SamplingParams
from openweights.jobs.unsloth.rollout import StepSampler
from openweights.models.forward import active_adapter
from tests.benchmarks.models import adapted, byte_tokenizer, qwen_7b


def copy_rate() -> float:
    """Bytes a second, counting what is read and what is written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 2**31 / (start.elapsed_time(end) / 1e3)


def floor_ms(base: Any, rows: int, positions: float) -> float:
    """Milliseconds a token: weights but the embedding, and the cache, read once."""
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    weights -= base.model.embed_tokens.weight.numel() * 2
    config = base.config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return (weights + rows * positions * per_token) / copy_rate() * 1e3


def measure(
    name: Any, model: nn.Module, prompts: list[list[int]], new: int, precision: Any
) -> dict[str, Any]:
    """Best of three calls after one that captures and compiles."""
    engine = generation_engine(name, model, byte_tokenizer(), precision=precision)
    adapter = active_adapter(model)
    params = SamplingParams(max_new_tokens=new, stop_token_ids=(), detokenize=False)
    torch.cuda.reset_peak_memory_stats()
    sampler = StepSampler(engine, params)
    seconds = [sampler.sample(prompts, adapter, seed=(seed,)).seconds for seed in range(4)]
    best = min(seconds[1:])
    return {
        "engine": name,
        "precision": precision,
        "first_s": round(seconds[0], 2),
        "s": round(best, 3),
        "tokens_per_s": round(len(prompts) * new / best),
        "ms_per_token": round(best / new * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--engines", nargs="+", default=["cuda_graph", "transformers"])
    parser.add_argument("--precision", nargs="+", default=["model"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = adapted(qwen_7b())
    lengths = [options.prompt - 16 + i % 32 for i in range(options.batch)]
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in lengths]
    floor = floor_ms(model.get_base_model(), options.batch, options.prompt + options.new / 2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(options)}")
    print(f"floor: {floor:.2f} ms a token")
    rows: list[dict[str, Any]] = []
    for name in options.engines:
        for precision in options.precision:
            rows.append(measure(name, model, prompts, options.new, precision))
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"floor_ms": floor, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
