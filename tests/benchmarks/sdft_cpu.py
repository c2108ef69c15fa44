"""SDFT steps of a small real model on the CPU, ours and trl's in turn, on the same rows.

    python -m tests.benchmarks.sdft_cpu MODEL_FOLDER [--steps 6 --rounds 3]

MODEL_FOLDER is a small instruct model, such as the one that `ow demo` keeps below the home. Both
train a LoRA of rank 16 on all linear layers, with one sampled completion a prompt, full logits and
an EMA teacher. The two alternate, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the worker does
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import TrainerCallback

from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import load_model

NEW_TOKENS, BATCH = 24, 8


class StepTimes(TrainerCallback):
    """Seconds from the end of a step to the end of the next, and the processor's; the first one is
    left out.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.seconds.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"How many hours are {n} days?"},
                {"role": "assistant", "content": f"[{24 * n} h] Exactly {24 * n} hours."},
            ]
        }
        for n in range(2, 130)
    ]


def config(model: Path, folder: Path, steps: int) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    return TrainingConfig(
        model=str(model),
        training_file=str(data),
        loss="sdft",
        sdft_demo_template="{prompt}\n\n{demonstration}",
        sdft_max_new_tokens=NEW_TOKENS,
        max_seq_length=512,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=steps,
        engine="transformers",
        output_dir=str(folder / "out"),
    )


def ours(model: Path, folder: Path, steps: int) -> list[tuple[float, float]]:
    settings, times = config(model, folder, steps), StepTimes()
    sdft_train(settings, *load_model(settings), rows(), None, callbacks=[times])
    return times.seconds


def trl(model: Path, folder: Path, steps: int) -> list[tuple[float, float]]:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    settings, times = config(model, folder, steps), StepTimes()
    adapted, tokenizer = load_model(settings)
    lora = adapted.peft_config["default"]
    data = [
        {"prompt": row["messages"][:1], "privileged_context": row["messages"][1]["content"]}
        for row in rows()
    ]
    trainer = SDFTTrainer(
        model=adapted.unload(),
        args=SDFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            max_steps=steps,
            max_completion_length=NEW_TOKENS,
            num_generations=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            teacher_model_kind="ema",
            teacher_update_rate=0.02,
            teacher_prompt_template="{prompt}\n\n{privileged_context}",
            distillation_mode="full_logits",
            distillation_alpha=1.0,
            distillation_is_clip=None,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[times],
        peft_config=lora,
    )
    trainer.train()
    return times.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}
    for _ in range(options.rounds):
        for name, run in (("ours", ours), ("trl", trl)):
            with tempfile.TemporaryDirectory() as folder:
                found[name] += run(options.model, Path(folder), options.steps)
    for at, kind in enumerate(("seconds", "CPU seconds")):
        report(kind, {name: [pair[at] for pair in pairs] for name, pairs in found.items()})


def report(kind: str, seconds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kind} a step:")
    for name, values in seconds.items():
        print(f"{name:5} median {median[name]:.2f}, from {min(values):.2f} to {max(values):.2f}")
    print(f"ours takes {median['ours'] / median['trl']:.2f} of trl's {kind}")


if __name__ == "__main__":
    main()
