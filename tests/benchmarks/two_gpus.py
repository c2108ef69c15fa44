"""Optimizer steps of SFT, SDFT and GRPO on one GPU and on two, with the model on each of them (ddp)
or its layers spread over them (fsdp).

    python -m tests.benchmarks.two_gpus 7b:sft:ddp 7b:sdft:ddp --gpus 1
    python -m tests.benchmarks.two_gpus 7b:sft:ddp 7b:sdft:fsdp 32b:sft:fsdp 70b-nf4:sdft:fsdp
    python -m tests.benchmarks.two_gpus 7b:sdft:ddp 7b:grpo:ddp --batch 64 --new 512 --ends 150
    python -m tests.benchmarks.two_gpus tiny:sft:fsdp tiny:sdft:fsdp tiny:sdft:ddp --cpu

A case is shape, loss and how the GPUs share it; shapes are `7b` (7.6 B), `32b` (32.8 B) and
`70b-nf4` (70.6 B, in nf4, which needs bitsandbytes), with random weights and a LoRA of rank 32 on
all linear layers; `--layers` makes them shorter. A step has `--batch` rows, over all GPUs. Rows of
SFT have log-normal lengths around 300 tokens. Of SDFT and GRPO, prompts have about 200 tokens, the
teacher's 500, GRPO's groups 8 completions. Every completion has `--new` tokens; with `--ends N` one
token of N ends it, so that lengths are uneven, with a mean below N, and `--new` the longest. One
line of JSON a case: the mean step after the first, tokens a second (of SFT all, of the others those
of completions), losses, and what each card held at most. Consecutive cases of one shape and way
share the model.
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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import Qwen2ForCausalLM, TrainerCallback

from openweights.jobs.unsloth.grpo_ft import grpo_train
from openweights.jobs.unsloth.runtime.ranks import join, leave
from openweights.jobs.unsloth.sdft import sdft_train
from openweights.jobs.unsloth.sft import sft_train
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.load import local_rank
from openweights.models.shape import ModelShape, usual_shape
from openweights.models.sharding import decoder_layers, spread_layers
from tests.benchmarks.grpo_step import REWARD
from tests.benchmarks.models import adapted, byte_tokenizer, qwen_config
from tests.benchmarks.sdft_step import rows as sdft_rows
from tests.benchmarks.sft_step import conversations, texts

SHAPES = {
    "7b": usual_shape(7.6),
    "32b": usual_shape(32.8),
    "70b": usual_shape(70.6),
    "tiny": ModelShape(300, 64, 128, 3, 4, 2, 16),
}
GROUP = 8
TRAIN: dict[str, Any] = {
    "sft": sft_train,
    "sdft": sdft_train,
    "grpo": partial(grpo_train, fetch=lambda name, _: Path(name), log_event=lambda event: None),
}


class StepTimes(TrainerCallback):
    """Seconds from the end of a step to the end of the next, so that rollouts count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def random_model(shape: ModelShape, *, spread: bool, in_4bit: bool, device: torch.device) -> Any:
    """With an adapter. What is spread is never whole on a GPU: it comes as the zeros of memory that
    nobody has touched, and each rank draws its own parts.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = qwen_config(shape)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            base: Any = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if not spread:
        base.to_empty(device=device)
    elif distributed.get_rank() == 0:
        base.to_empty(device="cpu")
    if not spread or distributed.get_rank() == 0:
        kind = type(base.model.rotary_emb)
        base.model.rotary_emb = kind(config).to(device if not spread else "cpu")
    model = adapted(base)
    if in_4bit and not spread:
        raise SystemExit("nf4 is measured with fsdp alone")
    if spread:
        spread_layers(model, device, in_4bit=in_4bit)
    draw_weights(model, device)
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, device: torch.device) -> None:
    """The same ones on each rank where it has all of them."""
    whole, own = (torch.Generator(device).manual_seed(7 * at) for at in (1, 2 + local_rank()))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            part = parameter.to_local()
            if parameter.shape[1] == 1:  # bytes of nf4
                part.view(torch.uint8).random_(generator=own)
            else:
                part.normal_(std=0.02, generator=own)
        elif not parameter.requires_grad and parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=whole)
        elif not parameter.requires_grad:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for layer in decoder_layers(base_model(model)).modules():
        state: Any = getattr(layer, "quant_state", None)
        if state is not None:  # all blocks have one scale
            state.state2.absmax.zero_()
            state.offset.fill_(0.05)
            # On a CPU bitsandbytes would pack anew, for good, what was gathered for one pass.
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@dataclass
class Loaded:
    """A model, which consecutive cases share.

    Attributes:
        gib: What the card held at most while it was loaded.
    """

    of: tuple[str, str]
    model: Any
    shape: ModelShape
    seconds: float
    gib: float


def load(name: str, parallel: str, options: argparse.Namespace, device: torch.device) -> Loaded:
    bare, _, suffix = name.partition("-")
    shape = SHAPES[bare]
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started, in_4bit = time.perf_counter(), suffix == "nf4"
    model = random_model(shape, spread=parallel == "fsdp", in_4bit=in_4bit, device=device)
    if device.type == "cuda":
        model.enable_input_require_grads()
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Loaded((name, parallel), model, shape, time.perf_counter() - started, gib)


def run_case(loaded: Loaded, loss: str, options: argparse.Namespace) -> dict[str, Any]:
    model = loaded.model
    more = loaded.shape.vocabulary // options.ends if options.ends else 0
    tokenizer = byte_tokenizer(more)  # which must know an end, or it is none
    if more:  # each time: a Trainer puts the tokenizer's in their place
        ends = tokenizer.convert_tokens_to_ids([f"<{at}>" for at in range(more)])
        base_model(model).generation_config.eos_token_id = ends
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = StepTimes()
    rows = conversations(texts(options.scale)[:512]) if loss == "sft" else sdft_rows(512)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(options, loss, Path(folder))
        trainer = TRAIN[loss](config, model, tokenizer, rows, None, callbacks=[times])
    step_s = statistics.mean(times.seconds[1:])
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result: dict[str, Any] = {
        "case": ":".join((loaded.of[0], loss, loaded.of[1])),
        "gpus": options.gpus,
        "layers": loaded.shape.layers,
        "batch": options.batch,
        "step_s": round(step_s, 3),
        "steps_s": [round(s, 3) for s in times.seconds],
        "tokens_per_s": round(tokens_per_step(options, loss, log) / step_s),
        "losses": [round(entry["loss"], 6) for entry in log],
        "loaded_s": round(loaded.seconds, 1),
    }
    timed = {key for key in log[-1] if key.endswith(("_s", "length"))}
    result |= {key: round(log[-1][key], 3) for key in sorted(timed)}
    if torch.cuda.is_available():
        own = (loaded.gib, torch.cuda.max_memory_allocated() / 2**30)
        cards: list[Any] = [own]
        if options.gpus > 1:
            cards = [None] * options.gpus
            distributed.all_gather_object(cards, own)
        result["gib_of_each"] = [{"loading": round(a, 1), "peak": round(b, 1)} for a, b in cards]
    return result


def settings(options: argparse.Namespace, loss: str, folder: Path) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.touch()
    own: dict[str, Any] = {}
    if loss == "sdft":
        own = {
            "sdft_gate": "off",
            "sdft_demo_template": "{prompt}\n\n{demonstration}",
            "sdft_demo_placement": "template",
            "sdft_max_new_tokens": options.new,
        }
    if loss == "grpo":
        reward = folder / "reward.py"
        reward.write_text(REWARD)
        own = {
            "grpo_reward_function": f"{reward}:score",
            "grpo_num_generations": GROUP,
            "grpo_max_completion_length": options.new,
        }
    micro = min(options.micro, options.batch // options.gpus)
    return TrainingConfig(
        model="random/shape",
        training_file=str(data),
        loss=loss,  # type: ignore[arg-type]
        r=32,
        lora_alpha=32,
        use_rslora=False,
        max_seq_length=2048,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // options.gpus // micro,
        max_steps=options.steps,
        warmup_steps=0,
        optim="adamw_torch",
        engine="transformers",
        output_dir=str(folder / "out"),
        **own,
    )


def tokens_per_step(
    options: argparse.Namespace, loss: str, log: Sequence[dict[str, float]]
) -> float:
    """The mean of those steps whose time is told."""
    if loss == "sft":
        return options.batch * statistics.mean(len(t) + 60 for t in texts(options.scale)[:512])
    length = "completion_length" if loss == "sdft" else "completions/mean_length"
    return options.batch * statistics.mean(entry[length] for entry in log[1:])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="SHAPE:LOSS:HOW")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, of all GPUs")
    parser.add_argument("--micro", type=int, default=4, help="rows of a forward pass at most")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--ends", type=int, default=0, help="one token of so many is an end")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths of SFT's rows")
    parser.add_argument("--cpu", action="store_true", help="gloo, to try it")
    return parser.parse_args(arguments)


def run_rank(options: argparse.Namespace) -> None:
    """All cases in a process that is one of those that train."""
    device = torch.device("cpu" if options.cpu else f"cuda:{local_rank()}")
    if not options.cpu:
        torch.cuda.set_device(device)
    if options.gpus > 1:
        join()
    loaded: Loaded | None = None
    for case in options.cases:
        name, loss, parallel = case.split(":")
        if loaded is None or loaded.of != (name, parallel):
            loaded = None
            gc.collect()
            loaded = load(name, parallel, options, device)
        result = run_case(loaded, loss, options)
        if local_rank() == 0:
            print(json.dumps(result), flush=True)
        gc.collect()
    leave()


def main() -> None:
    options = parse(sys.argv[1:])
    if options.gpus == 1 or "LOCAL_RANK" in os.environ:
        run_rank(options)
        return
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    command = [sys.executable, *launch, "-m", "tests.benchmarks.two_gpus", *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
