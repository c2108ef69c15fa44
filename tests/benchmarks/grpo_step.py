"""Whole optimizer steps of GRPO on one GPU: rollout, rewards, forward, backward, optimizer.

    python -m tests.benchmarks.grpo_step [--batch 32 --group 8 --new 256] [--trl-steps 3]

The model has a 7 B model's shape and random weights, with a LoRA of rank 32; prompts have about 200
tokens. Hardly any token ends a completion, so every step generates as much. With `--trl-steps`
trl's own trainer follows on the same rows in the same process, sampling through `generate`. Under
`torchrun --nproc-per-node 2 -m tests.benchmarks.grpo_step --micro 16` two GPUs share the batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from openweights.jobs.unsloth.grpo_ft import grpo_args, grpo_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import local_rank
from tests.benchmarks.models import adapted, byte_tokenizer, qwen_7b
from tests.benchmarks.sdft_step import PROMPT, StepTimes, ranks

REWARD = "def score(completions):\n    return [len(set(text)) / 100 for text in completions]\n"


def config_of(options: argparse.Namespace, folder: Path) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    return TrainingConfig(
        model="random/qwen-7b-shape",
        training_file=str(data),
        loss="grpo",
        grpo_reward_function=f"{reward}:score",
        grpo_num_generations=options.group,
        grpo_max_completion_length=options.new,
        max_seq_length=2048,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.batch // (options.micro * ranks()),
        max_steps=options.steps,
        learning_rate=1e-5,
        optim="adamw_torch",
        rollout_precision=options.precision,
        output_dir=str(folder / "ours"),
    )


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": chr(97 + i % 26) * PROMPT},
                {"role": "assistant", "content": "z"},
            ]
        }
        for i in range(count)
    ]


def run_ours(options: argparse.Namespace, config: TrainingConfig) -> dict[str, Any]:
    times = StepTimes()
    torch.cuda.reset_peak_memory_stats()
    trainer = grpo_train(
        config,
        adapted(qwen_7b()),
        byte_tokenizer(),
        rows(128),
        None,
        fetch=lambda name, _: Path(name),
        log_event=lambda event: None,
        callbacks=[times],
    )
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    kept = ("loss", "reward", "grad_norm", "sampling_kl", "rollout_s", "rollout_tokens_per_s")
    return figures("ours", times, {key: log[key] for key in kept if key in log})


def run_trl(options: argparse.Namespace, config: TrainingConfig) -> dict[str, Any]:
    """trl's trainer with the same arguments and reward."""
    from trl import GRPOTrainer

    def reward(completions: list[Any], **_: Any) -> list[float]:
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [len(set(text)) / 100 for text in texts]

    times = StepTimes()
    args = grpo_args(config.model_copy(update={"max_steps": options.trl_steps}), "transformers")
    torch.cuda.reset_peak_memory_stats()
    GRPOTrainer(
        model=adapted(qwen_7b()),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows(128)]),
        processing_class=byte_tokenizer(),
        callbacks=[times],
    ).train()
    return figures("trl", times, {})


def figures(name: str, times: StepTimes, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "steps_s": times.seconds,
        "best_s": min(times.seconds[1:]),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", default="model")
    parser.add_argument("--trl-steps", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(local_rank())
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options, Path(folder))
        results = [run_ours(options, config)]
        if local_rank() == 0:
            print(results[-1] | {"gpus": ranks()}, flush=True)
        if options.trl_steps:
            gc.collect()
            torch.cuda.empty_cache()
            results.append(run_trl(options, config))
            print(results[-1], flush=True)
    if options.json and local_rank() == 0:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
