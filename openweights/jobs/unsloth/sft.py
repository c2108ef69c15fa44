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
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from openweights.jobs.unsloth.config.rows import is_weighted
from openweights.jobs.unsloth.data import Example, sft_examples
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
    train_rows: list[dict[str, Any]],
    test_rows: list[dict[str, Any]] | None,
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
    ends = eos_token_ids(model, tokenizer)
    weighted = any(map(is_weighted, [*train_rows, *(test_rows or [])]))

    def encoded(rows: list[dict[str, Any]], name: str) -> list[Example]:
        return sft_examples(config, tokenizer, rows, ends=ends, name=name, with_weights=weighted)

    examples = encoded(train_rows, "training_file")
    tests = encoded(test_rows, "test_file") if test_rows else None
    packed = config.packing and may_pack(model, examples)
    trainer = StepMeanTrainer(
        model=model,
        summed_loss=weighted_loss if weighted else token_loss,
        micro_batch_tokens=config.micro_batch_tokens if packed else None,
        args=trainer_args(config, **precision(model)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(tests) if tests else None,
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
