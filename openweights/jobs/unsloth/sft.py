"""Supervised fine-tuning: the mean cross-entropy of the answers' tokens in an optimizer step.

Where blocks have weights the loss is sum(weight * cross-entropy) / sum(|weight|): a weight of 0
leaves a block out, a negative one makes it less likely.

The average is exact under gradient accumulation: the sum over all micro-batches is divided by the
number of their labels, so that how a batch is split changes nothing. `packing=True` lays the rows
of an optimizer step end to end instead of padding them, in micro-batches as large as
`per_device_train_batch_size` rows of `max_seq_length`; steps and loss stay the same. It is used
only after this very model was seen to keep such rows apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.data import learned_rows
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.runtime.step_mean import StepMeanTrainer, SummedLoss
from openweights.jobs.unsloth.trainer_args import precision, run_trainer, trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.log_probs import scored_log_probs, token_scores
from openweights.models.packing import may_pack
from openweights.models.tokens import IGNORED, Collator, eos_token_ids

logger = logging.getLogger(__name__)


def sft_train(
    config: TrainingConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row] | None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from: str | None = None,
) -> SFTTrainer:
    """Train `model` on `conversations` rows and return the trainer.

    Args:
        test_rows: Evaluated as `test_file_eval_strategy` says.
        resume_from: Folder of a checkpoint.

    Raises:
        DatasetError: A row cannot be used, or none fits into `max_seq_length`.
    """
    given = {"training_file": train_rows, **({"test_file": test_rows} if test_rows else {})}
    ends = eos_token_ids(model, tokenizer)
    read = {
        name: learned_rows(config, tokenizer, rows, ends=ends, name=name)
        for name, rows in given.items()
    }
    weighted = any(table.is_weighted for table in read.values())
    packed = config.packing and may_pack(model, read["training_file"].longest(2))
    data = {name: table.for_training(weighted) for name, table in read.items()}
    trainer = StepMeanTrainer(
        model=model,
        summed_loss=weighted_loss if weighted else token_loss,
        micro_batch_tokens=config.micro_batch_tokens if packed else None,
        args=trainer_args(config, **precision(model)),
        processing_class=tokenizer,
        train_dataset=data["training_file"],
        eval_dataset=data.get("test_file"),
        data_collator=Collator(int(tokenizer.pad_token_id), packed),  # type: ignore[arg-type]
        callbacks=[*callbacks, RecomputationCallback(config.memory_budget_gb)],
    )
    return run_trainer(trainer, resume_from)


def token_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> SummedLoss:
    """Sum of the cross-entropy of each label."""
    scores = token_scores(base_model(model), batch, batch["labels"] != IGNORED)
    metrics = {"mean_token_accuracy": scores.is_top.sum(), "entropy": scores.entropy.sum()}
    return SummedLoss(-scores.log_probs.sum(), metrics)


def weighted_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> SummedLoss:
    """Sum of each token's weight times its cross-entropy."""
    scored = batch["weights"] != 0
    log_probs = scored_log_probs(base_model(model), batch, scored)
    return SummedLoss(-(batch["weights"][scored] * log_probs).sum())
