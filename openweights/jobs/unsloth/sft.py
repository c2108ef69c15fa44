"""Supervised fine-tuning: the mean cross-entropy of the answers' tokens in an optimizer step.

Where blocks have weights the loss is sum(weight * cross-entropy) / sum(|weight|): a weight of 0
leaves a block out, a negative one makes it less likely.

The average is exact under gradient accumulation: the sum over all micro-batches is divided by the
number of their labels, so that how a batch is split changes nothing. `packing=True` lays the rows
of a batch end to end instead of padding them; batches, steps and loss stay the same. It is used
only after this very model was seen to keep such rows apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from openweights.jobs.unsloth.config.rows import is_weighted
from openweights.jobs.unsloth.data import Example, sft_examples
from openweights.jobs.unsloth.runtime.step_mean import StepMeanTrainer, SummedLoss
from openweights.jobs.unsloth.trainer_args import run_trainer, trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.forward import base_model
from openweights.models.log_probs import scored_log_probs
from openweights.models.tokens import Collator, eos_token_ids

# Logits of one row may differ by this share of their size between packed and alone: rounding, not
# leakage.
LEAK_TOLERANCE = 1e-3

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
    packed = config.packing and _may_pack(model, examples)
    make_trainer = partial(StepMeanTrainer, summed_loss=weighted_loss) if weighted else SFTTrainer
    trainer = make_trainer(
        model=model,
        args=trainer_args(config),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(tests) if tests else None,
        data_collator=Collator(int(tokenizer.pad_token_id), packed),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    return run_trainer(trainer, resume_from)


def _may_pack(model: PeftModel, examples: Sequence[Example]) -> bool:
    packed = keeps_rows_apart(model, examples)
    logger.info(
        "packing: rows of a batch are laid end to end"
        if packed
        else "packing is off: this model does not keep packed rows apart, so rows are padded"
    )
    return packed


def weighted_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> SummedLoss:
    """Sum of each token's weight times its cross-entropy."""
    scored = batch["weights"] != 0
    log_probs = scored_log_probs(base_model(model), batch, scored)
    return SummedLoss(-(batch["weights"][scored] * log_probs).sum())


def keeps_rows_apart(model: PeftModel, examples: Sequence[Mapping[str, list[int]]]) -> bool:
    """Whether position ids alone keep a packed row from seeing the row before it.

    Changes the first of two packed rows and looks at the logits of the second, which must not move,
    and must be those of the row alone. Attention that masks by position ids passes; a kernel or an
    architecture that does not is found out.
    """
    first = list(examples[0]["input_ids"])[:32]
    second = list(examples[-1]["input_ids"])[:32]
    changed = [first[0]] * len(first) if len(set(first)) > 1 else [second[-1]] * len(first)
    with torch.no_grad():
        alone, packed, other = (
            _last_row_logits(model, rows) for rows in ([second], [first, second], [changed, second])
        )
    scale = float(alone.abs().max()) or 1.0
    # Rounding in half precision depends on the shape of the whole batch.
    loose = LEAK_TOLERANCE if packed.dtype == torch.float32 and not _is_half(model) else 5e-2
    leaked = float((packed - other).abs().max()) > LEAK_TOLERANCE * scale
    differs = float((packed - alone).abs().max()) > loose * scale
    return not leaked and not differs


def _last_row_logits(model: PeftModel, rows: Sequence[list[int]]) -> torch.Tensor:
    batch = Collator(0, packed=True)([{"input_ids": row, "labels": row} for row in rows])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    output = model(
        input_ids=batch["input_ids"].to(device),
        position_ids=batch["position_ids"].to(device),
        use_cache=False,
    )
    model.train(was_training)
    return output.logits[0, -len(rows[-1]) :].float()


def _is_half(model: PeftModel) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
