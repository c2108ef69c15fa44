"""Whole optimizer steps of SDFT against trl's trainer, on the same rows in the same process.

    python -m tests.benchmarks.sdft_step [--batch 32 --micro 32 --new 256] [--trl-micro 8]

The model has a 7 B model's shape and random weights, with a LoRA of rank 32; prompts have about 200
tokens, the teacher's about 500. No token ends a completion, so every step generates as much. trl
runs with full logits, one generation a prompt and an EMA teacher: the same work as ours. With
`--training-engine unsloth` ours trains through unsloth, which is imported first; trl is left out,
because unsloth replaces its trainers. Under `torchrun --nproc-per-node 2 -m
tests.benchmarks.sdft_step --micro 16 --trl-micro 0` two GPUs share the batch. `--monitor 32`
measures 32 conversations after every step, as `MonitoringCallback` does, and says what that takes.
Ours packs its rows, and recomputes as few layers as memory asks for: `--memory 24` gives it less,
and `--padded` leaves the rows apart. `--model FOLDER` takes a real model, and `--at-once 4` runs so
many processes of it on one card.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if "unsloth" in sys.argv:
    import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]

import torch
from datasets import Dataset
from transformers import TrainerCallback

from openweights.generation.choose import generation_engine
from openweights.generation.params import SamplingParams
from openweights.jobs.unsloth.monitoring import MonitoringCallback
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.sdft import SDFTTrainer
from openweights.jobs.unsloth.sdft_data import on_policy_dataset, sdft_examples
from openweights.jobs.unsloth.trainer_args import trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import load_model, local_rank
from openweights.models.packing import may_pack
from tests.benchmarks.models import adapted, byte_tokenizer, qwen_7b

PROMPT, DEMONSTRATION = 180, 250


class StepTimes(TrainerCallback):
    """Seconds from the end of a step to the end of the next, so that rollouts count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(round(now - self._last, 3))
        self._last = now


def ranks() -> int:
    """Processes that share a batch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": chr(97 + i % 26) * PROMPT},
                {"role": "assistant", "content": "z" * DEMONSTRATION},
            ]
        }
        for i in range(count)
    ]


def run_ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps of `SDFTTrainer` with the engine that "auto" takes."""
    data = folder / "rows.jsonl"
    data.touch()
    config = TrainingConfig(
        model=str(options.model or "random/qwen-7b-shape"),
        training_file=str(data),
        loss="sdft",
        sdft_divergence=options.divergence,
        sdft_demo_template="{prompt}\n\n{demonstration}",
        sdft_max_new_tokens=options.new,
        max_seq_length=2048,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.batch // (options.micro * ranks()),
        max_steps=options.steps,
        learning_rate=1e-5,
        optim="adamw_torch",
        engine=options.training_engine,
        output_dir=str(folder / "ours"),
    )
    model, tokenizer = load_ours(options, config, folder)
    times = StepTimes()
    events: list[dict[str, Any]] = []
    examples = sdft_examples(config, tokenizer, rows(512))
    tokens = options.micro * config.max_seq_length
    packed = not options.padded and may_pack(
        model, [{"input_ids": e.teacher_prompt_ids} for e in examples]
    )
    trainer = SDFTTrainer(
        model,
        trainer_args(config, save_strategy="no"),
        processing_class=tokenizer,
        train_dataset=on_policy_dataset(examples),
        sampling=SamplingParams(max_new_tokens=options.new, stop_token_ids=()),
        divergence=config.sdft_divergence,
        engine=generation_engine(options.engine, model, tokenizer),
        micro_batch_tokens=tokens if packed else None,
        callbacks=[
            times,
            *monitoring(options.monitor, config, tokenizer, events),
            RecomputationCallback(options.memory),
        ],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "divergence" in entry]
    parts: dict[str, Any] = {
        k: round(logs[-1][k], 3) for k in ("rollout_s", "teacher_s", "student_s")
    }
    parts["divergences"] = [round(log["divergence"], 4) for log in logs]
    if options.monitor:
        parts["monitoring_s"] = round(min(event["monitoring_s"] for event in events), 3)
    return figures("ours", times, parts | {"engine": options.engine})


def load_ours(options: argparse.Namespace, config: TrainingConfig, folder: Path) -> Any:
    """The model with its adapter, and the tokenizer; unsloth loads them from a folder."""
    if options.model:
        return load_model(config.model_copy(update={"r": 32, "lora_alpha": 32}))
    if options.training_engine == "transformers":
        return adapted(qwen_7b()), byte_tokenizer()
    saved = folder / "model"
    qwen_7b().save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    return load_model(config.model_copy(update={"model": str(saved), "r": 32, "lora_alpha": 32}))


def monitoring(
    conversations: int, config: TrainingConfig, tokenizer: Any, events: list[dict[str, Any]]
) -> list[MonitoringCallback]:
    """Measures after every step, along a direction too; nothing without conversations."""
    if not conversations:
        return []
    direction = torch.ones(3584)
    return [
        MonitoringCallback(
            config,
            tokenizer,
            rows(conversations),
            events.append,
            every_steps=1,
            direction=direction,
        )
    ]


def run_trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps of trl's `SDFTTrainer`."""
    from trl.experimental.sdft import SDFTConfig
    from trl.experimental.sdft import SDFTTrainer as TRLTrainer

    data = [
        {"prompt": row["messages"][:1], "privileged_context": row["messages"][1]["content"]}
        for row in rows(512)
    ]
    arguments = SDFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=options.trl_micro,
        gradient_accumulation_steps=options.batch // options.trl_micro,
        max_steps=options.trl_steps,
        max_completion_length=options.new,
        max_prompt_length=600,
        num_generations=1,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-5,
        teacher_model_kind="ema",
        teacher_update_rate=0.02,
        teacher_prompt_template="{prompt}\n\n{privileged_context}",
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
    )
    times = StepTimes()
    model = adapted(qwen_7b())
    lora = model.peft_config["default"]
    trainer = TRLTrainer(
        model=model.unload(),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=byte_tokenizer(),
        callbacks=[times],
        peft_config=lora,
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return figures("trl", times, {"micro": options.trl_micro})


def figures(name: str, times: StepTimes, more: dict[str, Any]) -> dict[str, Any]:
    """The first step compiles and captures; the best of the others counts."""
    return {
        "what": name,
        "step_s": min(times.seconds[1:]),
        "all_steps_s": times.seconds,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        **more,
    }


def share(count: int) -> None:
    """As many of this command at a time, and the median of all their steps but each one's first."""
    plain = sys.argv[1:]
    at = plain.index("--at-once")
    del plain[at : at + 2]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(count)]
        command = [sys.executable, "-m", "tests.benchmarks.sdft_step", *plain, "--json"]
        runs = [subprocess.Popen([*command, str(file)]) for file in files]
        codes = [run.wait() for run in runs]
        found = [json.loads(file.read_text())[0] for file in files if file.exists()]
    steps = [seconds for one in found for seconds in one["all_steps_s"][1:]]
    peaks = [one["peak_gib"] for one in found]
    told = {"at_once": count, "exit": codes, "median_step_s": statistics.median(steps)}
    print(json.dumps(told | {"peaks_gib": peaks}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--divergence", default="reverse_kl")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--training-engine", default="transformers")
    parser.add_argument("--padded", action="store_true", help="rows of ours are not packed")
    parser.add_argument("--memory", type=float, help="memory_budget_gb of ours, in GiB")
    parser.add_argument("--monitor", type=int, default=0, help="conversations to monitor")
    parser.add_argument("--trl-micro", type=int, default=8, help="0 leaves trl out")
    parser.add_argument("--trl-steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a real model")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the card")
    options = parser.parse_args()
    if options.at_once > 1:
        share(options.at_once)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(options)}")
    if options.training_engine == "unsloth":
        options.trl_micro = 0
    torch.cuda.set_device(local_rank())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for run in (run_ours, run_trl) if options.trl_micro else (run_ours,):
            results.append(run(options, Path(folder)))
            if local_rank() == 0:
                print(json.dumps(results[-1] | {"gpus": ranks()}), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    if len(results) > 1:
        print(f"ratio: {results[1]['step_s'] / results[0]['step_s']:.2f} times as fast as trl")
    if options.json and local_rank() == 0:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
