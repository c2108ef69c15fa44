"""The trainer's arguments that all losses share, from a `TrainingConfig`."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PrinterCallback, SchedulerType, Trainer, TrainingArguments
from trl import SFTConfig

from openweights.jobs.unsloth.config.fields import DEFAULT_WARMUP_STEPS
from openweights.jobs.unsloth.validate import TrainingConfig

logger = logging.getLogger(__name__)

LAST_RATE = 1e-7  # of "polynomial", as in transformers

Arguments = TypeVar("Arguments", bound=TrainingArguments)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def trainer_args(config: TrainingConfig, **overrides: Any) -> SFTConfig:
    """Arguments for a trl `SFTTrainer`.

    Rows come tokenised and labelled from `data.py` with an own collator, so all of trl's own data
    handling is off. `overrides` replace single arguments.
    """
    own = {
        "max_length": config.max_seq_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
        "loss_type": "nll",
    }
    return arguments(SFTConfig, config, **{**own, **overrides})


def arguments(kind: type[Arguments], config: TrainingConfig, **own: Any) -> Arguments:
    """What every trainer is told, and `own`, as arguments of the given kind."""
    cuda = torch.cuda.is_available()
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "warmup_steps": config.warmup_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": _schedule(config),
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        **_optimizer(config),
        **_evaluation(config),
        **_device(cuda),
        "logging_strategy": "steps",
        "logging_steps": config.logging_steps,
        # A NaN loss is to be seen, not replaced by the average of the steps before.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": max(1, config.keep_checkpoints),
        "save_only_model": False,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    args = kind(**{**values, **own})
    if args.n_gpu > 1:
        # Several GPUs in one process would be wrapped in DataParallel, which copies the adapters at
        # each step.
        logger.info("%d GPUs are there; this job trains on the first", args.n_gpu)
        args._n_gpu = 1
    if not cuda and args.world_size > 1:
        # accelerate says "cpu:0", to which torch.load cannot read the optimizer of a checkpoint.
        args._setup_devices = torch.device("cpu")
    return args


def precision(model: nn.Module) -> dict[str, Any]:
    """What a trainer on a CPU is told when the frozen weights are in bfloat16.

    Adapters are then multiplied in that type, as on a GPU; else each layer would widen its input
    for them, which takes a third more time.
    """
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    return {} if torch.cuda.is_available() else {"bf16": torch.bfloat16 in frozen}


def run_trainer(trainer: AnyTrainer, resume_from: str | None) -> AnyTrainer:
    """Let it train, from a checkpoint's folder when there is one, and return it."""
    # It prints what MetricsCallback logs.
    trainer.remove_callback(PrinterCallback)
    args = trainer.args
    if args.lr_scheduler_type != SchedulerType.CONSTANT:
        *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
        args.warmup_steps = warmup_steps(int(args.warmup_steps), steps)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def warmup_steps(asked: int, steps: int) -> int:
    """Steps of a run in which the learning rate rises.

    The default is at most a tenth of all; another number is taken, unless it is no less than all:
    then it is a tenth of them, too, and that is said.
    """
    most = steps // 10
    if asked == DEFAULT_WARMUP_STEPS and asked > most:
        logger.info("warmup_steps=%d of %d steps, a tenth of them at most", most, steps)
        return most
    if asked >= steps:
        logger.warning(
            "warmup_steps=%d is not less than the %d steps of this run, so that learning_rate "
            "would never be reached; it is %d instead, a tenth of them",
            asked,
            steps,
            most,
        )
        return most
    return asked


def _schedule(config: TrainingConfig) -> dict[str, Any]:
    """What a schedule is told beside its kind: "polynomial" ends at a rate below the first."""
    if config.lr_scheduler_type != "polynomial":
        return {}
    return {"lr_end": min(LAST_RATE, config.learning_rate / 10)}


def _optimizer(config: TrainingConfig) -> dict[str, Any]:
    """`optim` and `weight_decay` in transformers' words."""
    name, decay = config.optim, config.weight_decay
    if name == "adamw_8bit":
        if torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"):
            return {"optim": "adamw_8bit", "weight_decay": decay}
        logger.info("optim='adamw_8bit' needs CUDA and bitsandbytes; adamw_torch is used instead")
    if name == "adam":
        logger.info("optim='adam' has no weight decay, so weight_decay is not used")
        # Adam is AdamW without decay; its own kind of decay would be another optimizer.
        return {"optim": "adamw_torch", "weight_decay": 0.0}
    return {"optim": "sgd" if name == "sgd" else "adamw_torch", "weight_decay": decay}


def _evaluation(config: TrainingConfig) -> dict[str, Any]:
    if not config.has_test_set:
        return {"eval_strategy": "no"}
    steps = config.test_file_eval_steps
    return {
        "eval_strategy": config.test_file_eval_strategy,
        # A share of all steps stays a fraction, a number of steps must be whole.
        "eval_steps": int(steps) if steps is not None and steps >= 1 else steps,
    }


def _device(cuda: bool) -> dict[str, Any]:
    bf16 = cuda and torch.cuda.is_bf16_supported()
    return {
        "use_cpu": not cuda,
        "bf16": bf16,
        "fp16": cuda and not bf16,
        # On a CPU memory is not what is short, and recomputation costs a third more time.
        "gradient_checkpointing": cuda,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if cuda else None,
        "dataloader_pin_memory": cuda,
    }
