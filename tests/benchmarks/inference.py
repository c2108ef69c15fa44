"""`ow.inference` with one model beside `generate`, and two fine-tuned jobs of it served at once.

    python -m tests.benchmarks.inference MODEL [--prompts 1000] [--new 256] [--peers 256]
        [--train 6] [--json F]

It drives the product: jobs go into the store of this machine, whose worker starts by itself. Set
OPENWEIGHTS_HOME to an empty folder. MODEL is a folder or a name; answers are greedy, so that they
can be compared with those of `generate`, which is given the first `--peers` of the prompts, in
batches of so many. With `--train` two SFT jobs of so many steps follow, and one deployment serves
both and their base to many clients at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openweights import OpenWeights
from openweights.types import EventRecord

VERBS = ("sorts", "reverses", "counts", "groups", "merges", "filters", "sums", "prints", "compares")
NOUNS = ("integers", "words", "dates", "files", "matrices", "intervals", "graphs", "tuples")
RULES = ("in place", "lazily", "without loops", "with recursion", "in linear time", "stably")
STYLES = (
    "Explain each step.",
    "Give two examples of its use, too.",
    "Then name the cases in which it is slow.",
)
AT_ONCE = 64


def prompts(count: int) -> list[dict[str, Any]]:
    """Conversations that differ from each other."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        left, parts = index, list[str]()
        for words in (VERBS, NOUNS, RULES, STYLES):
            left, which = divmod(left, len(words))
            parts.append(words[which])
        verb, noun, rule, style = parts
        text = f"Write a Python function that {verb} {noun} {rule}. {style} (No. {index})"
        rows.append({"messages": [{"role": "user", "content": text}]})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- a file of prompts ---------------------------------------------------------------------------


def by_inference(ow: OpenWeights, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole job: from `create` to the stored file."""
    file = write(folder / "prompts.jsonl", prompts(options.prompts))
    started = time.perf_counter()
    told: list[tuple[float, float]] = []  # seconds since then, tokens a second

    def note(event: EventRecord) -> None:
        if "tokens_per_s" in event.data:
            told.append((time.perf_counter() - started, event.data["tokens_per_s"]))

    job = ow.inference.create(
        model=options.model,
        input_file_id=file,
        temperature=0.0,
        max_tokens=options.new,
        max_model_len=4096,
        engine=options.engine,
    )
    job.wait(on_event=note, poll_s=0.05)
    whole = time.perf_counter() - started
    answers = [json.loads(line) for line in ow.files.content(job.outputs["file"]).splitlines()]
    return {
        "name": "ow.inference",
        "prompts": len(answers),
        "first_answer_s": round(told[0][0], 2),
        "whole_job_s": round(whole, 1),
        "tokens_per_s": told[-1][1],
        "texts": [answer["completion"] for answer in answers],
    }


def by_generate(options: argparse.Namespace) -> dict[str, Any]:
    """The first prompts in one batch, after one that warms up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from openweights.models.templates.rendering import prompt_token_ids
    from openweights.models.tokens import eos_token_ids, pad_left
    from tests.benchmarks.humaneval import until_end

    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = eos_token_ids(model, tokenizer)
    rows = [prompt_token_ids(tokenizer, row["messages"]) for row in prompts(options.peers)]
    seconds, answers = 0.0, list[list[int]]()
    for new in (4, options.new):
        ids, mask = pad_left(rows, tokenizer.pad_token_id, model.device)
        started = time.perf_counter()
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=ends,
            )
        answers = [until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
        seconds = time.perf_counter() - started
    return {
        "name": "generate",
        "prompts": len(rows),
        "s": round(seconds, 2),
        "tokens_per_s": round(sum(map(len, answers)) / seconds),
        "texts": tokenizer.batch_decode(answers, skip_special_tokens=True),
    }


# ---- two jobs of one base ------------------------------------------------------------------------


def two_jobs(ow: OpenWeights, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both and their base behind one address, asked by many clients at a time."""
    jobs = [trained(ow, options, folder, answer) for answer in ("Aye.", "Nay.")]
    for job in jobs:
        assert job.wait().status == "completed", job.id
    started = time.perf_counter()
    apis = ow.api.multi_deploy([options.model, *(job.id for job in jobs)])
    assert len({api.job_id for api in apis.values()}) == 1, "one base, one deployment"
    api = next(iter(apis.values()))
    api.up()
    up_s = time.perf_counter() - started
    try:
        return {"name": "two jobs of one base", "up_s": round(up_s, 1)} | asyncio.run(
            asked(api, list(apis), options)
        )
    finally:
        api.down()


def trained(ow: OpenWeights, options: argparse.Namespace, folder: Path, answer: str) -> Any:
    """An SFT job that teaches one answer to everything."""
    said = {"role": "assistant", "content": answer}
    rows = [{"messages": [*row["messages"], said]} for row in prompts(64)]
    file = write(folder / f"{answer[:3]}.jsonl", rows)
    return ow.fine_tuning.create(
        model=options.model,
        training_file=ow.files.upload(file, purpose="conversations")["id"],
        loss="sft",
        max_steps=options.train,
        learning_rate=1e-3,
        warmup_steps=0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )


async def asked(api: Any, models: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The same questions to each model, all at once."""
    client, gate = api.async_client, asyncio.Semaphore(AT_ONCE)
    tokens = 0

    async def ask(model: str, row: dict[str, Any]) -> str:
        nonlocal tokens
        async with gate:
            answer = await client.chat.completions.create(
                model=model, messages=row["messages"], temperature=0, max_tokens=options.new
            )
        tokens += answer.usage.completion_tokens
        return answer.choices[0].message.content or ""

    questions = prompts(options.questions)
    started = time.perf_counter()
    texts = await asyncio.gather(*(ask(model, row) for row in questions for model in models))
    seconds = time.perf_counter() - started
    answers = {model: texts[at :: len(models)] for at, model in enumerate(models)}
    return {
        "requests": len(texts),
        "s": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "commonest": {model: max(set(own), key=own.count)[:60] for model, own in answers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--peers", type=int, default=256, help="0 leaves `generate` out")
    parser.add_argument("--train", type=int, default=0, help="0 leaves the two jobs out")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ow = OpenWeights()
    results: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        print({key: value for key, value in result.items() if key != "texts"}, flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False))

    with tempfile.TemporaryDirectory() as name:
        keep(by_inference(ow, options, Path(name)))
        if options.peers:
            keep(by_generate(options))
            pairs = list(zip(results[0]["texts"], results[1]["texts"], strict=False))
            print(f"equal answers: {sum(a == b for a, b in pairs)} of {len(pairs)}", flush=True)
        if options.train:
            keep(two_jobs(ow, options, Path(name)))


if __name__ == "__main__":
    main()
