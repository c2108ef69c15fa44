"""Wrong configs: what was changed, the field that the message must name, and words that it must
hold.
"""

from __future__ import annotations

from typing import Any

FILE = "conversations:file-0123456789ab"
GOOD: dict[str, Any] = {"model": "org/name", "training_file": FILE, "loss": "sft"}
SDFT: dict[str, Any] = {**GOOD, "loss": "sdft"}
DPO: dict[str, Any] = {**GOOD, "loss": "dpo", "training_file": "preference:file-0123456789ab"}
GRPO: dict[str, Any] = {**GOOD, "loss": "grpo"}
MISSING = "MISSING"  # as a value: leave the field out

MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    # required fields and their kinds
    ({**GOOD, "model": MISSING}, "model", "is required; pass it"),
    ({**GOOD, "loss": MISSING}, "loss", "is required; pass 'sft' or 'sdft' or 'dpo'"),
    ({**GOOD, "training_file": MISSING}, "training_file", "is required"),
    ({**GOOD, "loss": MISSING}, "loss", "is required"),
    ({**GOOD, "model": ""}, "model", "is empty"),
    ({**GOOD, "model": "org/name "}, "model", "padded with spaces"),
    ({**GOOD, "model": "a/b//c"}, "model", "neither a Hugging Face id"),
    ({**GOOD, "model": "my model"}, "model", "neither a Hugging Face id"),
    ({**GOOD, "model": 7}, "model", "must be a string, not 7"),
    ({**GOOD, "epochs": "3"}, "epochs", "must be a whole number, not"),
    ({**GOOD, "epochs": 1.5}, "epochs", "must be a whole number, not"),
    ({**GOOD, "epochs": True}, "epochs", "must be a whole number, not"),
    ({**GOOD, "epochs": 0}, "epochs", "at least 1"),
    ({**GOOD, "max_steps": -1}, "max_steps", "at least 1"),
    ({**GOOD, "warmup_steps": -1}, "warmup_steps", "at least 0"),
    ({**GOOD, "r": 0}, "r", "at least 1"),
    ({**GOOD, "lora_dropout": 1.0}, "lora_dropout", "less than 1"),
    ({**GOOD, "lora_dropout": float("nan")}, "lora_dropout", "must be a finite number, not nan"),
    ({**GOOD, "lora_alpha": 10**60}, "lora_alpha", "must be at most 1000000"),
    ({**GOOD, "lora_bias": "some"}, "lora_bias", "must be 'all' or 'none', not 'some'"),
    ({**GOOD, "target_modules": "q_proj"}, "target_modules", "must be a list, not"),
    ({**GOOD, "target_modules": []}, "target_modules", "no or empty module names"),
    ({**GOOD, "is_peft": False, "load_in_4bit": True}, "load_in_4bit", "cannot be trained; remove"),
    ({**GOOD, "is_peft": False, "engine": "unsloth"}, "engine", "trains a LoRA alone; use 'auto'"),
    (
        {**GOOD, "is_peft": False, "kl_to_base_steps": 5},
        "kl_to_base_steps",
        "the base model, which",
    ),
    ({**DPO, "is_peft": False}, "is_peft", "trains all weights, which loss='dpo' does not do"),
    ({**GOOD, "load_in_4bit": "yes"}, "load_in_4bit", "must be True or False, not"),
    ({**GOOD, "optim": "adamax"}, "optim", "must be 'adamw_8bit'"),
    ({**GOOD, "lr_scheduler_type": "warm"}, "lr_scheduler_type", "must be 'linear'"),
    ({**GOOD, "seed": -1}, "seed", "must be at least 0, not -1"),
    ({**GOOD, "seed": 2**32}, "seed", "must be less than 4294967296, not 4294967296; correct it"),
    ({**GOOD, "r": 5000}, "r", "must be at most 4096, not 5000"),
    *(
        ({**GOOD, "output_dir": name}, "output_dir", "cannot be a folder's name")
        for name in ("a\0b", "a/" + "b" * 300, "\ud800")
    ),
    ({**GOOD, "epochs": "3" * 999}, "epochs", "333…; correct it, or remove it for the default 1"),
    ({**GOOD, "model": "a/b/" + "c" * 999}, "model", "ccc… is neither"),
    ({**GOOD, "meta": "note"}, "meta", "must be a dict, not"),
    (
        {**GOOD, "engine": "vllm"},
        "engine",
        "must be 'auto', 'unsloth' or 'transformers', not 'vllm'",
    ),
    ({**GOOD, "parallel": "tensor"}, "parallel", "must be 'auto', 'ddp' or 'fsdp', not 'tensor'"),
    ({**GRPO, "parallel": "fsdp"}, "parallel", "for sft, sdft, dpo and orpo; use 'ddp' for grpo"),
    ({**GOOD, "parallel": "fsdp", "is_peft": False}, "parallel", "trains adapters; use 'ddp'"),
    ({**GOOD, "parallel": "fsdp", "engine": "unsloth"}, "engine", "the whole model on each GPU"),
    (
        {**SDFT, "parallel": "fsdp", "sdft_rollout_engine": "vllm"},
        "sdft_rollout_engine",
        "which parallel='fsdp' spreads; use 'auto' or 'transformers'",
    ),
    (
        {**SDFT, "parallel": "fsdp", "rollout_precision": "fp8"},
        "rollout_precision",
        "parallel='fsdp' cannot use; remove it",
    ),
    ({**GOOD, "chat_template": "chatml"}, "chat_template", "no Jinja template"),
    ({**GOOD, "job_id_suffix": "a b"}, "job_id_suffix", "letters, digits"),
    # learning rates
    ({**GOOD, "learning_rate": 0}, "learning_rate", "outside 1e-12 to 1"),
    ({**GOOD, "learning_rate": 5}, "learning_rate", ": 5 is outside 1e-12 to 1;"),
    ({**GOOD, "learning_rate": "2 * 5"}, "learning_rate", "'2 * 5' is 10, outside 1e-12 to 1"),
    ({**GOOD, "learning_rate": "ten"}, "learning_rate", "may hold only numbers"),
    ({**GOOD, "learning_rate": "10^-4"}, "learning_rate", "write ** for a power"),
    ({**GOOD, "learning_rate": "exit()"}, "learning_rate", "may hold only numbers"),
    ({**GOOD, "learning_rate": "10**10**10"}, "learning_rate", "too large"),
    ({**GOOD, "learning_rate": "1/0"}, "learning_rate", "divides by zero"),
    ({**GOOD, "learning_rate": "(-1)**0.5"}, "learning_rate", "not a real number"),
    ({**GOOD, "learning_rate": True}, "learning_rate", "not a number"),
    ({**GOOD, "learning_rate": None}, "learning_rate", "not a number"),
    # losses and fields of other losses
    ({**GOOD, "loss": "ppo"}, "loss", "must be 'sft', 'sdft', 'dpo', 'orpo' or 'grpo', not 'ppo'"),
    ({**GOOD, "loss": "dpo"}, "training_file", "has the purpose 'conversations'"),
    ({**DPO, "lora_bias": "all"}, "lora_bias", "remove it for loss='dpo'"),
    ({**GRPO, "train_on": "all"}, "train_on", "belongs to loss='sft', not to loss='grpo'"),
    (
        {**GOOD, "rollout_precision": "fp8"},
        "rollout_precision",
        "belongs to loss='sdft' or loss='g",
    ),
    ({**DPO, "beta": 0}, "beta", "must be greater than 0 for loss='dpo'"),
    ({**GOOD, "max_grad_norm": -1}, "max_grad_norm", "must be at least 0.0, not -1"),
    ({**SDFT, "train_on_responses_only": False}, "train_on_responses_only", "completions only"),
    ({**GOOD, "sdft_ema_alpha": 0.1}, "sdft_ema_alpha", "or choose loss='sdft'"),
    ({**GOOD, "grpo_num_generations": 4}, "grpo_num_generations", "belongs to loss='grpo'"),
    ({**GRPO, "sdft_ema_alpha": 0.1}, "sdft_ema_alpha", "belongs to loss='sdft'"),
    ({**GRPO, "grpo": {"beta": 0}}, "grpo", "give its fields one by one"),
    ({**GRPO, "num_generations": 8}, "num_generations", "did you mean 'grpo_num_generations'?"),
    ({**GRPO, "grpo_num_generation": 8}, "grpo_num_generation", "did you mean 'grpo_num_gen"),
    ({**GRPO, "grpo_num_generations": 1}, "grpo_num_generations", "must be at least 2, not 1"),
    ({**GRPO, "grpo_num_generations": 6}, "grpo_num_generations", "make it a multiple of 6"),
    ({**GRPO, "grpo_max_completion_length": 2048}, "grpo_max_completion_length", "no room for"),
    ({**GRPO, "grpo_temperature": 0}, "grpo_temperature", "must be at least 0.001, not 0"),
    ({**GRPO, "grpo_loss_type": "ppo"}, "grpo_loss_type", "must be 'dapo', 'grpo', 'dr_grpo' or"),
    ({**GRPO, "grpo_scale_rewards": True}, "grpo_scale_rewards", "'group', 'batch' or 'none'"),
    ({**GRPO, "grpo_max_failed_reward_fraction": 1}, "grpo_max_failed_reward_fraction", "than 1"),
    ({**GRPO, "beta": 0.1, "lora_bias": "all"}, "lora_bias", "or beta=0"),
    ({**GRPO, "grpo_use_vllm": True, "engine": "unsloth"}, "grpo_use_vllm", "or 'auto'"),
    ({**GRPO, "grpo_judge_prompt": "Grade it."}, "grpo_judge_prompt", "holds no {answer}"),
    ({**GRPO, "grpo_judge_prompt": "{answer}"}, "grpo_judge_prompt", "only counts with 'simil"),
    ({**GRPO, "grpo_judge_best": 100}, "grpo_judge_best", "is the scale of grpo_judge_prompt"),
    ({**GRPO, "grpo_judge_model": "gpt-5"}, "grpo_judge_model", "only counts with 'similarity_"),
    ({**GRPO, "grpo_reward_function": "rouge"}, "grpo_reward_function", "did you mean 'rouge_l'?"),
    ({**GRPO, "grpo_reward_function": "x"}, "grpo_reward_function", "or 'file.py:function'"),
    ({**GRPO, "grpo_reward_function": "a.py:f()"}, "grpo_reward_function", "is no reward"),
    ({**GRPO, "grpo_reward_function": []}, "grpo_reward_function", "is empty; name one of"),
    ({**GRPO, "grpo_reward_function": 5}, "grpo_reward_function", "must be a string or a list or"),
    ({**GRPO, "grpo_reward_function": {"rouge_l": 0}}, "grpo_reward_function", "other than 0"),
    ({**GRPO, "grpo_reward_function": {"rouge_l": 1e300}}, "grpo_reward_function", "32-bit sums"),
    ({**GRPO, "grpo_reward_function": {"rouge_l": -1e-30}}, "grpo_reward_function", "32-bit sums"),
    ({**GRPO, "grpo_reward_function": {"rouge_l": "1"}}, "grpo_reward_function", "must be"),
    (
        {**GRPO, "grpo_reward_function": ["rouge_l", "rouge_l"]},
        "grpo_reward_function",
        "give each once, with a weight",
    ),
    (
        {**GRPO, "grpo_reward_function": ["a.py:score", "b.py:score"]},
        "grpo_reward_function",
        "names 'score' twice",
    ),
    # names that do not exist
    ({**GOOD, "learning_rat": 1e-4}, "learning_rat", "did you mean 'learning_rate'?"),
    ({**GOOD, "lora_r": 8}, "lora_r", "did you mean 'r'?"),
    ({**GOOD, "lr": 1e-4}, "lr", "did you mean 'learning_rate'?"),
    ({**GOOD, "bf16": True}, "bf16", "a GPU computes in bfloat16, and what is trained is float32"),
    (
        {**SDFT, "sdft_max_completion_length": 16},
        "sdft_max_completion_length",
        "did you mean 'sdft_max_new_tokens'?",
    ),
    ({**GOOD, "num_train_epochs": 2}, "num_train_epochs", "did you mean 'epochs'?"),
    ({**GOOD, "my_note": "x"}, "my_note", "meta="),
    ({**GOOD, "eval_every_n_steps": 0}, "eval_every_n_steps", "must be 'log' or at least 1, not 0"),
    ({**GOOD, "report_to": ["mlflow"]}, "report_to[0]", "must be 'wandb' or 'tensorboard'"),
    ({**GOOD, "holdout_fraction": 1.0}, "holdout_fraction", "less than 1"),
    ({**GOOD, "holdout_fraction": 0.1, "test_file": FILE}, "holdout_fraction", "one of the two"),
    ({**SDFT, "holdout_fraction": 0.1}, "holdout_fraction", "not to loss='sdft'"),
    # files
    (
        {**GOOD, "training_file": "preference:file-1"},
        "training_file",
        "has the purpose 'preference'",
    ),
    ({**GOOD, "training_file": "no/such.jsonl"}, "training_file", "nor a local file"),
    ({**GOOD, "test_file": "file-1"}, "test_file", "neither a file id"),
    # evaluation and sampling
    ({**GOOD, "test_file_eval_strategy": "steps"}, "test_file_eval_strategy", "no test_file"),
    ({**GOOD, "test_file_eval_steps": 5}, "test_file_eval_steps", "strategy='steps'"),
    (
        {
            **GOOD,
            "test_file": FILE,
            "test_file_eval_strategy": "steps",
            "test_file_eval_steps": 2.5,
        },
        "test_file_eval_steps",
        "whole number of steps",
    ),
    (
        {**GOOD, "logp_callback_datasets": {"a": "preference:file-1"}},
        "logp_callback_datasets['a']",
        "has the purpose 'preference'",
    ),
    (
        {**GOOD, "logp_callback_datasets": {"a/b": FILE, "a_b": FILE}},
        "logp_callback_datasets['a_b']",
        "the tag of an earlier one",
    ),
    *(
        (
            {**GOOD, "logp_callback_datasets": {name: FILE}},
            f"logp_callback_datasets['{name}']",
            "a meaning",
        )
        for name in ("total", "max_steps", "total_steps")
    ),
    *(
        ({**GOOD, field: [{"dataset": FILE, "tag": tag}]}, f"{field}[0].tag", "a file's name")
        for field in ("sampling_callbacks", "mcq_callbacks")
        for tag in ("t" * 300, "ü" * 150, "a\0b", "a\nb", "\ud800")
    ),
    (
        {**GOOD, "logp_callback_datasets": {"step": FILE}},
        "logp_callback_datasets['step']",
        "choose another name",
    ),
    (
        {**GOOD, "mcq_callbacks": [{"dataset": FILE}]},
        "mcq_callbacks[0].dataset",
        "questions with choices are read",
    ),
    ({**GOOD, "sampling_callbacks": [{}]}, "sampling_callbacks[0].dataset", "is required"),
    (
        {**GOOD, "sampling_callbacks": [{"dataset": FILE, "eval_steps": "ln"}]},
        "sampling_callbacks[0].eval_steps",
        "must be 'log' or a whole number, not 'ln'; correct it, or remove it for the default 10",
    ),
    (
        {**GOOD, "sampling_callbacks": [{"dataset": FILE, "temperature": -1.0}]},
        "sampling_callbacks[0].temperature",
        "at least 0",
    ),
    (
        {**GOOD, "sampling_callbacks": [{"dataset": FILE, "max_token": 5}]},
        "sampling_callbacks[0].max_token",
        "did you mean 'max_tokens'?",
    ),
    (
        {**GOOD, "sampling_callbacks": [{"dataset": FILE, "eval_steps": 0}]},
        "sampling_callbacks[0].eval_steps",
        "must be 'log' or at least 1, not 0",
    ),
    (
        {
            **GOOD,
            "sampling_callbacks": [
                {"dataset": FILE, "tag": "a/b"},
                {"dataset": FILE, "tag": "a_b"},
            ],
        },
        "sampling_callbacks[1].tag",
        "give each a tag of its own",
    ),
    # the hub
    ({**GOOD, "finetuned_model_id": "name"}, "finetuned_model_id", "must be org/name"),
    ({**GOOD, "finetuned_model_id": "None/x"}, "finetuned_model_id", "no organization of yours"),
    ({**GOOD, "finetuned_model_id": "o/{size}"}, "finetuned_model_id", "which nothing fills in"),
    ({**GOOD, "finetuned_model_id": "o/{"}, "finetuned_model_id", "stray brace"),
    # self-distillation
    ({**SDFT, "sdft_ema_alpha": 1.5}, "sdft_ema_alpha", "at most 1"),
    ({**SDFT, "sdft_temperature": 0.0}, "sdft_temperature", "at least 0.001"),
    ({**SDFT, "sdft_top_p": 0.0}, "sdft_top_p", "at least 1e-06"),
    ({**SDFT, "sdft_divergence": "kl"}, "sdft_divergence", "must be 'reverse_kl'"),
    ({**SDFT, "sdft_demo_template": "Answer."}, "sdft_demo_template", "no {demonstration}"),
    ({**SDFT, "sdft_demo_template": "{Demonstration}"}, "sdft_demo_template", "no {demonstration}"),
    (
        {**SDFT, "sdft_demo_template": "{demonstration!r}"},
        "sdft_demo_template",
        "no {demonstration}",
    ),
    (
        {**SDFT, "sdft_demo_template": "{demonstration}", "sdft_demo_placement": "turns"},
        "sdft_demo_template",
        "not used with sdft_demo_placement='turns'",
    ),
    ({**SDFT, "sdft_demo_repeats": 2}, "sdft_demo_repeats", "only counts with"),
    ({**SDFT, "sdft_max_new_tokens": 2048}, "sdft_max_new_tokens", "leaves no room for a prompt"),
    ({**SDFT, "sdft_skip_tokens": 256}, "sdft_skip_tokens", "nothing would be learned"),
]
