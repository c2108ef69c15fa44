"""Optimizer steps of SFT and DPO beside trl's, on the same rows in the same process.

    python -m tests.benchmarks.sft_step [--loss sft --layers 28 --steps 12] [--liger]
    python -m tests.benchmarks.sft_step --cpu MODEL_FOLDER [--steps 6]

Rows have log-normal lengths around 300 tokens, 16 of them a step, with a LoRA of rank 32 on all
linear layers. On a GPU the model has a 7 B model's shape and random weights. trl runs with padding
and with its packing (`padding_free`), with and without liger's fused loss when that is installed;
the best of the others is what ours is compared with.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the worker does
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

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
        self._last = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


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
    trainer = train(config, model, tokenizer, rows, None, callbacks=[steps])
    return figures("ours", steps, trainer, {"micro": micro})


def settings(options: argparse.Namespace, folder: Path, micro: int) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    return TrainingConfig(
        model=str(options.cpu or "random/qwen-7b-shape"),
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
        engine="transformers",
        memory_budget_gb=options.memory,
        output_dir=str(folder / "ours"),
    )


def load_ours(options: argparse.Namespace, config: TrainingConfig) -> tuple[Any, Any]:
    if options.cpu:
        return load_model(config)
    model = adapted(qwen_7b(options.layers))
    model.enable_input_require_grads()
    return model, byte_tokenizer()


def run_trl(
    options: argparse.Namespace, folder: Path, micro: int, *, packed: bool, liger: bool
) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    shared: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options.batch // micro,
        "max_steps": options.steps,
        "max_length": 2048,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda and not options.trl_keeps,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if cuda else None,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "use_liger_kernel": liger,
        "padding_free": packed,
    }
    steps = Steps()
    if options.cpu:
        # In the type of ours: the one that it is saved in, where the processor computes in it.
        base = AutoModelForCausalLM.from_pretrained(options.cpu, dtype=base_dtype(str(options.cpu)))
        tokenizer = AutoTokenizer.from_pretrained(options.cpu)
    else:
        base, tokenizer = qwen_7b(options.layers), byte_tokenizer()
    lora = LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    rows = (pairs if options.loss == "dpo" else conversations)(texts(options.scale))
    kind, arguments = (DPOTrainer, DPOConfig(**shared))
    if options.loss == "sft":
        kind, arguments = SFTTrainer, SFTConfig(**shared, completion_only_loss=False)
    trainer = kind(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[steps],
    )
    reset_peak()
    trainer.train()
    more = {"micro": micro, "padding_free": packed, "liger": liger}
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
    print(json.dumps(result | {"peak_gib": peak, "times": [round(s, 3) for s in seconds]}))
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
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--memory", type=float, help="memory_budget_gb of ours")
    parser.add_argument("--micro", type=int, nargs="*", default=[4])
    parser.add_argument("--trl-micro", type=int, nargs="*", default=[4])
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--trl-keeps", action="store_true", help="no recomputation in trl")
    parser.add_argument("--cpu", type=Path, help="a small model's folder: everything on the CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = [run_ours(options, folder, micro) for micro in options.micro]
        peers = [
            run_trl(options, folder, micro, packed=packed, liger=liger)
            for micro in options.trl_micro
            for packed in (False, True)
            for liger in ((False, True) if options.liger else (False,))
            if not packed or (options.loss == "dpo" and not options.cpu)
            if not liger or importlib.util.find_spec("liger_kernel")
        ]
    best = min(one["step_s"] for one in ours)
    summary = {"ours_tokens_per_s": tokens_per_step(options) / best}
    if peers:
        summary["times_of_the_best_peer"] = min(one["step_s"] for one in peers) / best
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
