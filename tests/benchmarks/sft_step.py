"""Optimizer steps of SFT and DPO beside those of others, on the same rows.

    python -m tests.benchmarks.sft_step [--loss sft --layers 28 --steps 12] [--liger]
    python -m tests.benchmarks.sft_step --cpu MODEL_FOLDER [--steps 6 --rounds 3]
    python -m tests.benchmarks.sft_step --saved FOLDER --peer unsloth --unsloth keeps packed
    python -m tests.benchmarks.sft_step --saved FOLDER --four-bit [--peer unsloth]
    python -m tests.benchmarks.sft_step --saved FOLDER --training-engine unsloth --trl-micro

Rows have log-normal lengths around 300 tokens, 16 of them a step, with a LoRA of rank 32 on all
linear layers. On a GPU the model has random weights and a 7 B model's shape, or with `--billions
0.5` a smaller one's. With `--training-engine unsloth` ours trains what unsloth loads. trl runs
with padding and with its packing (`padding_free`), with and without liger's fused loss when that
is installed; `--peer transformers` is the plain Trainer with peft. unsloth must be imported first
and replaces trl's trainers, so it has a process of its own, without ours. The best of the others
is what ours is compared with; on a CPU with rounds of each in turn, and by the process's CPU time,
too, which is hardly changed by what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the worker does
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

if "unsloth" in sys.argv:
    os.environ.setdefault("UNSLOTH_FUSED_PREFERENCE_LOSS", "1")
    import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from openweights.jobs.unsloth.preference.trainer import preference_train
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import base_dtype, load_model
from tests.benchmarks.models import TARGETS, adapted, byte_tokenizer, qwen_7b

ROWS, BATCH = 4096, 16


class Steps(TrainerCallback):
    """Seconds of each step; the first ones, which compile and measure, are left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.at_end: Callable[[], None] = lambda: None
        self._last, self._last_cpu = 0.0, 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        if self._last:
            self.seconds.append(now - self._last)
            self.cpu_seconds.append(cpu - self._last_cpu)
        self._last, self._last_cpu = now, cpu
        self.at_end()


def texts(scale: float) -> list[str]:
    """Answers of log-normal length; a byte is a token of the large model's tokenizer."""
    draw = random.Random(0)
    sizes = [min(int(draw.lognormvariate(5.55, 0.6) * scale), 1900) + 8 for _ in range(ROWS)]
    return ["".join(draw.choices("abcdefgh ", k=size)) for size in sizes]


def conversations(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": "Say something."},
                {"role": "assistant", "content": answer},
            ]
        }
        for answer in answers
    ]


def pairs(answers: list[str]) -> list[dict[str, Any]]:
    user = [{"role": "user", "content": "Say something."}]
    return [
        {
            "prompt": user,
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": answer[::-1] + "."}],
        }
        for answer in answers
    ]


def run_ours(options: argparse.Namespace, folder: Path, micro: int) -> dict[str, Any]:
    config = settings(options, folder, micro)
    steps = Steps()
    model, tokenizer = load_ours(options, config)
    train, rows = sft_train, conversations(texts(options.scale))
    if options.loss == "dpo":
        train, rows = preference_train, pairs(texts(options.scale))
    reset_peak()
    with profiled(options.profile, steps):
        trainer = train(config, model, tokenizer, rows, None, callbacks=[steps])
    return figures("ours", steps, trainer, {"micro": micro, "tokens": tokens_per_step(options)})


@contextmanager
def profiled(path: Path | None, steps: Steps) -> Iterator[None]:
    """Writes where the time of the fifth step went, by kernel, into a file; nothing without one."""
    if path is None:
        yield
        return
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    plan = torch.profiler.schedule(wait=4, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=plan) as profile:
        steps.at_end = profile.step
        yield
    averages = profile.key_averages()
    tables = [averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
              for key in ("self_cuda_time_total", "self_cpu_time_total")]  # fmt: skip
    path.write_text("\n".join(tables))


def settings(options: argparse.Namespace, folder: Path, micro: int) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    return TrainingConfig(
        model=str(options.cpu or options.saved or "random/qwen-7b-shape"),
        load_in_4bit=options.four_bit,
        training_file=str(data),
        loss=options.loss,
        r=32,
        lora_alpha=32,
        use_rslora=False,
        max_seq_length=2048,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // micro,
        max_steps=options.steps,
        warmup_steps=0,
        optim="adamw_torch",
        engine=options.training_engine,
        memory_budget_gb=options.memory,
        output_dir=str(folder / "ours"),
    )


def load_ours(options: argparse.Namespace, config: TrainingConfig) -> tuple[Any, Any]:
    if options.cpu or options.saved:
        return load_model(config)
    model = adapted(qwen_7b(options.layers, options.billions))
    model.enable_input_require_grads()
    return model, byte_tokenizer()


def saved(options: argparse.Namespace) -> None:
    """The large model in its folder, for those that load it from one."""
    if not (options.saved / "config.json").exists():
        qwen_7b(options.layers, options.billions).save_pretrained(options.saved)
        byte_tokenizer().save_pretrained(options.saved)
    reset_peak()


def load_base(options: argparse.Namespace) -> tuple[Any, Any]:
    """Base model and tokenizer of the peers."""
    if options.cpu:
        # In the type of ours: the one that it is saved in, where the processor computes in it.
        base = AutoModelForCausalLM.from_pretrained(options.cpu, dtype=base_dtype(str(options.cpu)))
        return base, AutoTokenizer.from_pretrained(options.cpu)
    if options.saved is None:
        return qwen_7b(options.layers, options.billions), byte_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(
        options.saved,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if options.four_bit
        else None,
    )
    return base, byte_tokenizer()


LORA = LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")


def run_transformers(options: argparse.Namespace, folder: Path, micro: int) -> dict[str, Any]:
    """SFT by the plain Trainer with peft, on padded rows."""
    base, tokenizer = load_base(options)
    rows = [
        {"input_ids": tokenizer(text)["input_ids"][:2048]} for text in rendered(options, tokenizer)
    ]
    steps = Steps()
    trainer = Trainer(
        model=get_peft_model(base, LORA),
        args=TrainingArguments(**shared_arguments(options, folder, micro)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[steps],
    )
    reset_peak()
    trainer.train()
    return figures(
        "transformers", steps, trainer, {"micro": micro, "tokens": tokens_per_step(options)}
    )


def rendered(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    return [
        tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for row in conversations(texts(options.scale))
    ]


def shared_arguments(options: argparse.Namespace, folder: Path, micro: int) -> dict[str, Any]:
    """What all peers are told."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options.batch // micro,
        "max_steps": options.steps,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda and not options.trl_keeps,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if cuda else None,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-4,
    }


def run_unsloth(options: argparse.Namespace, folder: Path, micro: int, way: str) -> dict[str, Any]:
    """unsloth's loading and trainers, by its own settings.

    Args:
        way: `keeps` its activations, `recomputes` them as it recommends, or `packed`: rows of 2,048
            tokens, as many as a step of the others has tokens.
    """
    import unsloth  # pyright: ignore[reportMissingImports]
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    fast: Any = unsloth.FastLanguageModel
    model, tokenizer = fast.from_pretrained(
        model_name=str(options.saved), max_seq_length=2048, dtype=torch.bfloat16,
        load_in_4bit=options.four_bit,
    )  # fmt: skip
    recomputation = "unsloth" if way == "recomputes" else False
    model = fast.get_peft_model(
        model, r=32, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=recomputation, random_state=0, max_seq_length=2048,
    )  # fmt: skip
    steps = Steps()
    shared = shared_arguments(options, folder, micro)
    # trl's default would recompute whatever the model was told.
    shared |= {"gradient_checkpointing": way == "recomputes", "gradient_checkpointing_kwargs": None}
    if options.loss == "dpo":
        kind: Any = DPOTrainer
        args: Any = DPOConfig(**shared, max_length=2048)
        rows: list[Any] = pairs(texts(options.scale))
    else:
        kind = SFTTrainer
        args = SFTConfig(
            **shared, max_length=2048, dataset_text_field="text", packing=way == "packed"
        )
        rows = [{"text": text} for text in rendered(options, tokenizer)]
    trainer = kind(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[steps],
    )  # fmt: skip
    tokens = tokens_per_step(options)
    if way == "packed":
        sizes = [len(row) for row in trainer.train_dataset["input_ids"]]
        tokens = statistics.mean(sizes) * options.batch
    reset_peak()
    trainer.train()
    return figures("unsloth", steps, trainer, {"micro": micro, "way": way, "tokens": tokens})


def run_trl(
    options: argparse.Namespace, folder: Path, micro: int, *, packed: bool, liger: bool
) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    shared = shared_arguments(options, folder, micro)
    shared |= {"max_length": 2048, "use_liger_kernel": liger, "padding_free": packed}
    steps = Steps()
    base, tokenizer = load_base(options)
    rows = (pairs if options.loss == "dpo" else conversations)(texts(options.scale))
    kind, arguments = (DPOTrainer, DPOConfig(**shared))
    if options.loss == "sft":
        kind, arguments = SFTTrainer, SFTConfig(**shared, completion_only_loss=False)
    trainer = kind(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LORA,
        callbacks=[steps],
    )
    reset_peak()
    trainer.train()
    more = {"micro": micro, "padding_free": packed, "liger": liger}
    more["tokens"] = tokens_per_step(options)
    return figures("trl", steps, trainer, more)


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def figures(name: str, steps: Steps, trainer: Any, more: dict[str, Any]) -> dict[str, Any]:
    seconds = steps.seconds[2:] or steps.seconds
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"name": name, **more, "step_s": statistics.mean(seconds), "losses": losses[:3]}
    result["tokens_per_s"] = round(result["tokens"] / result["step_s"], 1)
    result["cpu_s"] = statistics.mean(steps.cpu_seconds[2:] or steps.cpu_seconds)
    told = result | {"peak_gib": peak, "times": [round(s, 3) for s in seconds]}
    print(json.dumps(told), flush=True)
    del trainer
    reset_peak()
    return result


def tokens_per_step(options: argparse.Namespace) -> float:
    """Of an average step: prompt, template and answer."""
    sizes = [len(text) + 60 for text in texts(options.scale)]
    return statistics.mean(sizes) * options.batch * (2 if options.loss == "dpo" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--billions", type=float, default=7.6, help="of the shape's parameters")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--memory", type=float, help="memory_budget_gb of ours")
    parser.add_argument("--training-engine", default="transformers", help="unsloth needs --saved")
    parser.add_argument("--micro", type=int, nargs="*", default=[4])
    parser.add_argument("--trl-micro", type=int, nargs="*", default=[4])
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--trl-keeps", action="store_true", help="no recomputation in trl")
    parser.add_argument("--peer", choices=("trl", "transformers", "unsloth"), default="trl")
    parser.add_argument("--unsloth", nargs="*", default=["keeps"], help="its ways, see the code")
    parser.add_argument("--saved", type=Path, help="folder of the large model, made if it is none")
    parser.add_argument("--four-bit", action="store_true", help="QLoRA; needs --saved")
    parser.add_argument("--profile", type=Path, help="file for the kernels of one step of ours")
    parser.add_argument("--cpu", type=Path, help="a small model's folder: everything on the CPU")
    options = parser.parse_args()
    ours: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.saved:
                saved(options)
            own = [] if options.peer == "unsloth" else options.micro
            ours += [run_ours(options, folder, micro) for micro in own]
            peers += [result for run in peer_runs(options, folder) if (result := attempted(run))]
    fastest = [max((one["tokens_per_s"] for one in some), default=None) for some in (ours, peers)]
    summary = dict(zip(("ours_tokens_per_s", "best_peer_tokens_per_s"), fastest, strict=True))
    if ours and peers:
        summary["times_of_the_best_peer"] = summary["ours_tokens_per_s"] / fastest[1]
        cpu = [min(one["cpu_s"] for one in some) for some in (ours, peers)]
        summary["ours_of_the_best_peers_cpu_time"] = cpu[0] / cpu[1]
    print(json.dumps(summary))


def peer_runs(options: argparse.Namespace, folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """What is compared with."""
    for micro in options.trl_micro:
        if options.peer == "unsloth":
            for way in options.unsloth:
                yield partial(run_unsloth, options, folder, micro, way)
            continue
        if options.peer == "transformers":
            yield partial(run_transformers, options, folder, micro)
            continue
        for packed in (False, True) if options.loss == "dpo" and not options.cpu else (False,):
            for liger in (False, True) if options.liger else (False,):
                if not liger or importlib.util.find_spec("liger_kernel"):
                    yield partial(run_trl, options, folder, micro, packed=packed, liger=liger)


def attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What the run measured; None where memory is too small for it."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        print(f"{run}: out of memory: {str(error)[:200]}", flush=True)
    reset_peak()
    return None


if __name__ == "__main__":
    main()
