"""Which field was meant by a name that no field has: a slip, or what another trainer calls it.

A name means a field that the job's loss reads, or, with the prefix of a loss, one that this loss
reads: `sdft_max_completion_length` is `sdft_max_new_tokens`, and not the field of grpo that is
written alike.
"""

from __future__ import annotations

import difflib
import re

from openweights.client.job_options import JobOptions
from openweights.errors import closest
from openweights.jobs.unsloth.config.fields import FILE_PURPOSES, TrainingFields
from openweights.jobs.unsloth.config.problems import field_losses

# By field, what trl, transformers, peft, unsloth, axolotl, OpenAI's API and people call it.
_CALLED = {
    "model": "model_name model_name_or_path base_model model_id pretrained_model "
    "pretrained_model_name_or_path",
    "training_file": "dataset data train_file train_dataset train_data training_data data_path "
    "training_dataset dataset_name dataset_path train_path",
    "test_file": "validation_file eval_file eval_dataset valid_file val_file test_dataset "
    "validation_dataset eval_data test_data",
    "holdout_fraction": "test_size val_size validation_split eval_split val_set_size test_split "
    "validation_fraction",
    "loss": "objective method algorithm loss_fn training_type trainer",
    "chat_template": "template",
    "template_options": "chat_template_kwargs template_kwargs",
    "finetuned_model_id": "hub_model_id hf_repo repo_id output_model hub_repo",
    "push_to_private": "hub_private_repo private private_repo",
    "job_id_suffix": "suffix ft_id_suffix job_suffix run_name name experiment_name",
    "max_seq_length": "max_length max_seq_len max_sequence_length sequence_len seq_length seq_len "
    "cutoff_len context_length block_size model_max_length max_context_length max_prompt_length",
    "load_in_4bit": "use_4bit load_4bit qlora",
    "is_peft": "use_peft use_lora lora full_finetuning full_fine_tuning peft",
    "target_modules": "lora_target_modules lora_modules modules",
    "lora_bias": "bias",
    "r": "lora_r rank lora_rank lora_dim",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "epochs": "n_epochs num_epochs num_train_epochs max_epochs train_epochs epoch",
    "max_steps": "num_steps steps total_steps max_train_steps num_training_steps iterations "
    "max_iters n_steps",
    "per_device_train_batch_size": "batch_size train_batch_size per_device_batch_size bs "
    "per_gpu_train_batch_size micro_batch_size mini_batch_size device_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation_steps gradient_accumulation "
    "accumulation_steps accumulate_grad_batches",
    "warmup_steps": "warmup num_warmup_steps warmup_ratio lr_warmup_steps",
    "learning_rate": "lr learning_rate_multiplier peak_lr max_lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type",
    "logging_steps": "log_steps log_every log_every_n_steps logging_interval",
    "optim": "optimizer",
    "weight_decay": "wd",
    "seed": "random_seed random_state data_seed",
    "beta": "kl_coef kl_coeff kl_beta kl_penalty init_kl_coef kl_weight",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm max_norm grad_norm_clip",
    "memory_budget_gb": "max_memory",
    "save_steps": "save_every checkpoint_steps save_interval checkpoint_every",
    "keep_checkpoints": "save_total_limit",
    "train_on": "assistant_only_loss completion_only_loss train_on_completions_only "
    "train_on_inputs",
    "packing": "sample_packing pack",
    "test_file_eval_steps": "eval_steps evaluation_steps test_steps",
    "test_file_eval_strategy": "eval_strategy evaluation_strategy",
    "sdft_ema_alpha": "teacher_update_rate ema_alpha ema_rate ema_decay ema teacher_ema",
    "sdft_divergence": "kl_type kl_direction distillation_loss",
    "sdft_skip_tokens": "num_loss_tokens_to_skip",
    "sdft_max_new_tokens": "max_new_tokens max_completion_length max_tokens "
    "max_completion_tokens max_response_length max_output_tokens",
    "grpo_max_completion_length": "max_completion_length max_new_tokens max_tokens "
    "max_completion_tokens max_response_length max_output_tokens",
    "grpo_num_generations": "group_size num_samples n_generations num_rollouts "
    "num_return_sequences",
    "grpo_epsilon": "clip_range cliprange clip_epsilon",
    "grpo_reward_function": "reward_funcs reward_functions rewards reward_fn reward_func reward",
    "grpo_judge_model": "judge",
    "engine": "backend",
    "requires_vram_gb": "vram vram_gb gpu_memory gpu_memory_gb requires_vram",
    "allowed_hardware": "hardware gpu gpus gpu_type",
}
# What has no field, because it is done without being asked for.
_DONE = {
    **dict.fromkeys(
        ("bf16", "fp16", "dtype", "torch_dtype", "precision", "mixed_precision", "half_precision"),
        "a GPU computes in bfloat16, and what is trained is float32",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing"),
        "activations are computed again where memory is short (memory_budget_gb)",
    ),
    **dict.fromkeys(
        ("device", "device_map", "num_gpus", "n_gpu", "world_size"),
        "the GPUs of the machine are used that there are",
    ),
}
_ALIKE = 0.8  # of 1: a slip or two
_OTHERS = 0.95  # names of others are many, and of equal slips that in a name of ours is likelier
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def meant_field(name: str, loss: object = None) -> str | None:
    """The field that was probably meant.

    Args:
        loss: What the job trains with, as it was given; where it is none, every field will do.
    """
    plain = _CAMEL.sub("_", name).lower().replace("-", "_")
    prefix, _, stem = plain.partition("_")
    if prefix not in FILE_PURPOSES:
        return _read_by(str(loss), plain, plain) or closest(plain, _known(str(loss)))
    # "sft_gate" of sdft is a slip in the prefix.
    return _read_by(prefix, plain, stem) or _read_by(str(loss), plain, stem)


def done_anyway(name: str) -> str | None:
    """Why a name of other trainers has no field here."""
    return _DONE.get(name)


def _known(loss: str) -> list[str]:
    """What a job of that loss may be given; everything where it is none."""
    fields = TrainingFields.model_fields
    reads = [f for f in fields if loss not in FILE_PURPOSES or loss in field_losses(f, loss)]
    return [*reads, *JobOptions.model_fields]


def _read_by(loss: str, plain: str, stem: str) -> str | None:
    """The field of a loss that is called so, or written nearly so.

    Args:
        stem: `plain` without the prefix of a loss.
    """
    known = _known(loss)
    exact = (plain, f"{loss}_{stem}", stem)
    if found := next((field for field in exact if field in known), None):
        return found
    called = {other: field for field in reversed(known) for other in _CALLED.get(field, "").split()}
    if stem in called:
        return called[stem]
    spelled = {_without_prefix(field): field for field in known} | {f: f for f in known}
    near = [(_alike(text, other), other) for text in (plain, stem) for other in spelled]
    near += [(_alike(stem, other) * _OTHERS, other) for other in called if other not in spelled]
    likeness, best = max(near)
    return (called | spelled)[best] if likeness >= _ALIKE else None


def _without_prefix(field: str) -> str:
    prefix, _, stem = field.partition("_")
    return stem if prefix in FILE_PURPOSES else field


def _alike(text: str, other: str) -> float:
    return difflib.SequenceMatcher(None, text, other).ratio()
