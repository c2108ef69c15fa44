"""Training on pairs of answers, one of which is preferred, by DPO or ORPO.

Not trl's trainers: `DPOTrainer` keeps a second adapter as the reference and averages over
micro-batches of unequal size, and its ORPO is experimental and renders the rows itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from openweights.jobs.unsloth.config.rows import Row
from openweights.jobs.unsloth.dpo_ft import summed_dpo_loss
from openweights.jobs.unsloth.orpo_ft import summed_orpo_loss
from openweights.jobs.unsloth.preference.data import (
    COLUMNS,
    PreferenceCollator,
    preference_examples,
)
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.runtime.step_mean import StepMeanTrainer
from openweights.jobs.unsloth.token_table import TokenTable
from openweights.jobs.unsloth.trainer_args import precision, run_trainer, trainer_args
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.packing import may_pack
from openweights.models.tokens import eos_token_ids
from openweights.models.weights import Reference


def preference_train(
    config: TrainingConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row] | None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from: str | None = None,
) -> StepMeanTrainer:
    """Train `model` on `preference` rows and return the trainer.

    Args:
        test_rows: Evaluated as `test_file_eval_strategy` says.
        resume_from: Folder of a checkpoint.

    Raises:
        DatasetError: A row cannot be used, or none fits into `max_seq_length`.
    """
    if config.loss == "dpo":
        loss: Any = partial(summed_dpo_loss, beta=config.beta, reference=Reference(model))
    else:
        loss = partial(summed_orpo_loss, beta=config.beta)
    ends = eos_token_ids(model, tokenizer)

    def pairs(rows: Sequence[Row], name: str) -> TokenTable:
        return preference_examples(config, tokenizer, rows, ends=ends, name=name)

    examples = pairs(train_rows, "training_file")
    packed = may_pack(model, examples.longest(2, "chosen_input_ids"))
    trainer = StepMeanTrainer(
        model,
        summed_loss=loss,
        args=trainer_args(config, **precision(model)),
        processing_class=tokenizer,
        train_dataset=examples.dataset(*COLUMNS),
        eval_dataset=pairs(test_rows, "test_file").dataset(*COLUMNS) if test_rows else None,
        data_collator=PreferenceCollator(int(tokenizer.pad_token_id), packed),  # type: ignore[arg-type]
        callbacks=[*callbacks, RecomputationCallback(config.memory_budget_gb)],
    )
    return run_trainer(trainer, resume_from)
