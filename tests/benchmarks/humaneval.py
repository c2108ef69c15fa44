"""HumanEval by greedy generation: pass@1 and tokens a second of ours and of `generate`.

    python -m tests.benchmarks.humaneval MODEL [--new 512] [--dtype bfloat16] [--problems 164]
        [--engine cuda_graph] [--batches 32] [--json F]

MODEL is a folder or a name. Problems, and how answers are judged, are those of `ow eval`.
`generate` completes batches of each size of `--batches`, prompts of like lengths together: what its
own answers differ by is what rounding does. Where answers of two differ, the first tokens that do
are compared by a forward of the same weights in float32 (`Parting`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openweights.generation.choose import generation_engine
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import GenerationRequest, SamplingParams
from openweights.jobs.evaluate.tasks import humaneval
from openweights.models.templates.rendering import prompt_token_ids
from openweights.models.tokens import eos_token_ids, pad_left

Answer = Callable[[list[list[int]], int], list[list[int]]]


def by_engine(engine: GenerationEngine, prompts: list[list[int]], new: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_new_tokens=new, detokenize=False)
    found = engine.generate([GenerationRequest(prompt, params) for prompt in prompts])
    return [own[0].token_ids for own in found]


@torch.no_grad()
def by_generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], new: int, size: int
) -> list[list[int]]:
    """Batches of `size`, prompts of like lengths together."""
    ends = eos_token_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), size):
        part = order[start : start + size]
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


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two answers to a problem part.

    Attributes:
        at: Index of the first token that differs.
        gap: Logit of the first answer's token less that of the second's, in float32.
        step: Distance of neighbouring numbers of the engines' type at these logits.
        rounding: How far the type's own forward takes the gap from float32's.
        best: Whose token is the likeliest in float32: 0, 1, or -1 for neither.
    """

    problem: int
    at: int
    gap: float
    step: float
    rounding: float
    best: int


@torch.no_grad()
def partings(
    model: Any,
    exact: Any,
    prompts: list[list[int]],
    first: list[list[int]],
    second: list[list[int]],
) -> Iterator[Parting]:
    """Of the answers that differ.

    Args:
        model: What answered.
        exact: The same weights in float32.
    """
    for index, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True)):
        if a == b:
            continue
        at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
        assert at is not None, "one answer is a part of the other, though both had room"
        ids = torch.tensor([[*prompt, *a[:at]]], device=model.device)
        wide, own = (
            m(input_ids=ids, logits_to_keep=1).logits[0, -1].float() for m in (exact, model)
        )
        pair = [a[at], b[at]]
        gap = float(wide[pair[0]] - wide[pair[1]])
        step = float(wide[pair].abs().max().log2().floor().exp2()) * torch.finfo(model.dtype).eps
        rounding = abs(float(own[pair[0]] - own[pair[1]]) - gap)
        best = int(wide.argmax())
        yield Parting(index, at, gap, step, rounding, pair.index(best) if best in pair else -1)


def compared(found: list[Parting], passed: list[list[bool]], of: int) -> dict[str, Any]:
    """What there is to say of two engines' answers."""
    ratios = sorted(abs(p.gap) / p.step for p in found)
    return {
        "equal_answers": of - len(found),
        "passed_by_first_alone": sum(a and not b for a, b in zip(*passed, strict=True)),
        "passed_by_second_alone": sum(b and not a for a, b in zip(*passed, strict=True)),
        "likeliest_in_float32": [sum(p.best == who for p in found) for who in (0, 1, -1)],
        "gaps_in_steps": [round(ratio, 2) for ratio in ratios],
        "largest_gap": max((abs(p.gap) for p in found), default=0.0),
        "largest_rounding": max((p.rounding for p in found), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--engine", default="cuda_graph", choices=("cuda_graph", "transformers"))
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    auto: Any = AutoModelForCausalLM
    rounded, exact = (
        auto.from_pretrained(options.model, dtype=kind).to(device)
        for kind in (torch.bfloat16, torch.float32)
    )
    exact.load_state_dict(rounded.state_dict())  # the same numbers
    model = exact if options.dtype == "float32" else rounded
    task = humaneval()
    rows = task.rows[: options.problems]
    prompts = [prompt_token_ids(tokenizer, row["messages"]) for row in rows]
    engine = generation_engine(options.engine, model, tokenizer)
    engines: dict[str, Answer] = {options.engine: partial(by_engine, engine)}
    for size in options.batches:
        engines[f"generate, batches of {size}"] = partial(by_generate, model, tokenizer, size=size)
    results: list[dict[str, Any]] = []
    answers: dict[str, list[list[int]]] = {}
    passed: dict[str, list[bool]] = {}

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        print(result, flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))

    for name, answer in engines.items():
        answer(prompts, 8)  # compiles
        started = time.perf_counter()
        found = answers[name] = answer(prompts, options.new)
        seconds = time.perf_counter() - started
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        passed[name] = [grade.score == 1 for grade in task.grade(rows, texts)]
        tokens = sum(map(len, found))
        keep(
            {
                "name": name,
                "dtype": options.dtype,
                "passed": sum(passed[name]),
                "of": len(prompts),
                "pass@1": round(sum(passed[name]) / len(prompts), 3),
                "tokens": tokens,
                "s": round(seconds, 2),
                "tokens_per_s": round(tokens / seconds),
            }
        )
    for one, two in combinations(engines, 2):
        found = list(partings(model, exact, prompts, answers[one], answers[two]))
        for parting in found:
            print(parting)
        keep(
            {"name": f"{one} | {two}", **compared(found, [passed[one], passed[two]], len(prompts))}
        )


if __name__ == "__main__":
    main()
