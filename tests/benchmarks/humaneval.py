"""HumanEval by greedy generation, on one GPU: pass@1 and tokens a second of ours and of `generate`.

    python -m tests.benchmarks.humaneval MODEL [--new 512] [--json F]

MODEL is a folder or a name. Problems, and how answers are judged, are those of `ow eval`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.generation.choose import EngineName, generation_engine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.evaluate.tasks import humaneval
from openweights.models.template import prompt_token_ids
from openweights.models.tokens import eos_token_ids, pad_left


def by_engine(
    name: EngineName, model: Any, tokenizer: Any, prompts: list[list[int]], new: int
) -> list[list[int]]:
    engine = generation_engine(name, model, tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=new, detokenize=False)
    found = engine.generate([GenerationRequest(prompt, params) for prompt in prompts])
    return [own[0].token_ids for own in found]


@torch.no_grad()
def by_generate(model: Any, tokenizer: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Batches of 32, prompts of like lengths together."""
    ends = eos_token_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        ids, mask = pad_left([prompts[i] for i in part], tokenizer.pad_token_id, model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=ends,
        )
        for index, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = until_end(row, ends)
    return answers


def until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its end token, with that; all of one that has none."""
    end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: end + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
    task = humaneval()
    prompts = [prompt_token_ids(tokenizer, row["messages"]) for row in task.rows]
    results: list[dict[str, Any]] = []
    answers: dict[str, list[list[int]]] = {}
    for name in ("cuda_graph", "generate"):
        for count in (8, len(prompts)):  # the first compiles
            torch.cuda.synchronize()
            started = time.perf_counter()
            given = (model, tokenizer, prompts[:count], options.new)
            found = by_generate(*given) if name == "generate" else by_engine(name, *given)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        answers[name] = found
        tokens = sum(map(len, found))
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        passed = int(sum(grade.score for grade in task.grade(task.rows, texts)))
        results.append(
            {
                "name": name,
                "passed": passed,
                "of": len(prompts),
                "pass@1": round(passed / len(prompts), 3),
                "tokens": tokens,
                "s": round(seconds, 2),
                "tokens_per_s": round(tokens / seconds),
            }
        )
        print(results[-1], flush=True)
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"equal answers: {same} of {len(prompts)}")
    if options.json:
        options.json.write_text(json.dumps([*results, {"equal_answers": same}], indent=2))


if __name__ == "__main__":
    main()
