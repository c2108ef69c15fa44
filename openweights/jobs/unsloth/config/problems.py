"""Which fields of a `TrainingConfig` belong to which loss, and what can be wrong between them.

Each function yields (field, what is wrong; what to do). Client-side: no torch here.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator

from openweights.client.datasets import HOLD, no_dataset
from openweights.client.watching.metrics import TOTALS
from openweights.errors import shown, spelled
from openweights.jobs.unsloth.config.fields import (
    DEFAULT_WARMUP_STEPS,
    FILE_PURPOSES,
    DatasetRef,
    TrainingFields,
)
from openweights.jobs.unsloth.config.grpo_fields import BEST, DEFAULT_JUDGE, JUDGES, reward_choices
from openweights.number_words import number_words

Problems = Iterator[tuple[str, str]]

# Fields that only some losses read; all others count for every loss. What begins with the name of a
# loss belongs to it.
FIELD_LOSSES: dict[str, tuple[str, ...]] = {
    "beta": ("dpo", "orpo", "grpo"),
    "holdout_fraction": ("sft", "dpo", "orpo"),
    "packing": ("sft",),
    "rollout_precision": ("sdft", "grpo"),
    "train_on": ("sft",),
    "train_on_responses_only": ("sft",),
}
# With these values, or with any (None), a field asks another loss for nothing that it does not do.
HARMLESS: dict[str, tuple[object, ...] | None] = {
    "beta": None,
    "packing": None,
    "train_on": ("responses", "last"),
    "train_on_responses_only": (True,),
}
# What to do when a field of another loss was given; sdft_* and the rest have general words.
FIELD_REMEDIES = {
    ("train_on_responses_only", "sdft"): "remove it: sdft always trains on completions only",
}
MOST_TAG_BYTES = 200  # file names may have 255, and the step stands beside the tag
# Keys of events, one of which the name of a set of log-probabilities becomes.
EVENT_KEYS = ("type", "step", "tag", "path", "file", "loss", "error", *TOTALS)


def config_problems(config: TrainingFields) -> Problems:
    """What is wrong between fields, as (field, what; what to do)."""
    yield from foreign_field_problems(config)
    yield from file_problems(config)
    yield from template_problems(config)
    yield from tag_problems(config)
    yield from preference_problems(config)
    yield from sdft_problems(config)
    yield from grpo_problems(config)
    yield from full_problems(config)
    if config.parallel == "fsdp":
        yield from spreading_problems(config)
    yield from hub_problems(config)
    yield from test_set_problems(config)


def config_notes(config: TrainingFields, steps: int) -> Problems:
    """What is taken as it is, and is likely not what was meant, as (field, what; what to do).

    Args:
        steps: Optimizer steps of the run.
    """
    given = config.model_fields_set
    if "warmup_steps" in given and config.warmup_steps >= steps and config.warmup_steps:
        yield (
            "warmup_steps",
            f"is {config.warmup_steps} of {steps} steps, so that learning_rate would never be "
            f"reached; {steps // 10} are taken, a tenth of them",
        )
    is_default = "warmup_steps" in given and config.warmup_steps == DEFAULT_WARMUP_STEPS
    if is_default and steps // 10 < config.warmup_steps < steps:
        yield (
            "warmup_steps",
            f"is {config.warmup_steps}, the default, which is at most a tenth of the {steps} steps:"
            f" {steps // 10}; another number is taken as it is",
        )
    if "warmup_steps" in given and config.warmup_steps and config.lr_scheduler_type == "constant":
        yield "warmup_steps", "lr_scheduler_type='constant' has none; use 'constant_with_warmup'"
    if config.logging_steps > steps:
        yield (
            "logging_steps",
            f"is {config.logging_steps} of {steps} steps, so that no loss is logged; lower it",
        )
    every = config.test_file_eval_steps
    if config.has_test_set and every is not None and every > steps:
        yield (
            "test_file_eval_steps",
            f"is {every:g} of {steps} steps, so that nothing is tested; lower it",
        )
    yield from _rate_notes(config)


def _rate_notes(config: TrainingFields) -> Problems:
    """A rate at which training is likely to diverge. Plain SGD knows no usual ones."""
    most, usual = (1e-2, "1e-5 to 5e-4") if config.is_peft else (1e-3, "1e-6 to 1e-4")
    if config.learning_rate > most and config.optim != "sgd":
        kind = "a LoRA" if config.is_peft else "full fine-tuning"
        yield (
            "learning_rate",
            f"{number_words(config.learning_rate, 6)} is likely too high for {kind}: usual are "
            f"{usual}; lower it",
        )


def field_losses(field: str, loss: str) -> tuple[str, ...]:
    """Losses that read `field`; with `loss` itself when every loss does."""
    owner = field.partition("_")[0]
    return (owner,) if owner in FILE_PURPOSES else FIELD_LOSSES.get(field, (loss,))


def foreign_field_problems(config: TrainingFields) -> Problems:
    """Fields of another loss that were given and ask for what this one does not do."""
    for field in sorted(config.model_fields_set):
        losses = field_losses(field, config.loss)
        if config.loss not in losses and not _is_harmless(config, field):
            owner = " or ".join(f"loss={name!r}" for name in losses)
            remedy = FIELD_REMEDIES.get((field, config.loss), f"remove it, or choose {owner}")
            yield field, f"belongs to {owner}, not to loss={config.loss!r}; {remedy}"


def unread_fields(config: TrainingFields) -> list[str]:
    """Fields that were given, and that this loss does not read, so that one set of settings serves
    several losses.
    """
    given = config.model_fields_set
    return sorted(f for f in given if config.loss not in field_losses(f, config.loss))


def _is_harmless(config: TrainingFields, field: str) -> bool:
    value = getattr(config, field)
    usual = type(config).model_fields[field].get_default(call_default_factory=True)
    harmless = HARMLESS.get(field, ())
    return value == usual or harmless is None or value in harmless


def file_problems(config: TrainingFields) -> Problems:
    """Files that are neither here nor ids of the right purpose."""
    for ref in config.datasets():
        if not ref.file.startswith(f"{ref.purpose}:") and not os.path.isfile(ref.file):
            yield ref.name, _file_problem(ref, config.loss)


def _file_problem(ref: DatasetRef, loss: str) -> str:
    if ":file-" not in ref.file:
        return no_dataset(ref.file, ref.purpose)
    had = ref.file.split(":", 1)[0]
    if had in HOLD:
        return rows_problem(f"has the purpose {had!r}", had, ref, loss)
    return (
        f"has the purpose {shown(had)}, but {HOLD[ref.purpose]} are read; upload them with "
        f'ow.files.upload(path, purpose="{ref.purpose}")["id"]'
    )


def rows_problem(given: str, held: str, ref: DatasetRef, loss: str) -> str:
    """What is said of a dataset whose rows are of another kind than its reader's.

    Args:
        given: As in `has the purpose 'conversations'`.
        held: The purpose that its rows have.
    """
    if ref.field not in ("training_file", "test_file"):
        return f"{given}, but {HOLD[ref.purpose]} are read; give a file of {HOLD[ref.purpose]}"
    others = [name for name, purpose in FILE_PURPOSES.items() if purpose == held]
    change = f"use loss={spelled(others)}, or give" if others else "give"
    return (
        f"{given}, but loss={loss!r} learns from {HOLD[ref.purpose]}; {change} a file of "
        f"{HOLD[ref.purpose].partition(' (')[0]}"
    )


def template_problems(config: TrainingFields) -> Problems:
    """Older names that say something else than the newer ones."""
    given = {"train_on", "train_on_responses_only"} <= config.model_fields_set
    if given and config.train_on_responses_only != (config.train_on != "all"):
        yield (
            "train_on_responses_only",
            f"is {config.train_on_responses_only} beside train_on={config.train_on!r}; remove it",
        )
    thinking = config.template_options.get("enable_thinking", config.grpo_enable_thinking)
    if config.grpo_enable_thinking is not None and thinking != config.grpo_enable_thinking:
        yield (
            "grpo_enable_thinking",
            "says another thing than template_options['enable_thinking']; remove it",
        )


def tag_problems(config: TrainingFields) -> Problems:
    """Tags name the files of a callback, so equal ones would overwrite each other's."""
    named: dict[str, list[tuple[str, str]]] = {
        field: [(f"{field}[{i}].tag", c.tag) for i, c in enumerate(getattr(config, field) or [])]
        for field in ("sampling_callbacks", "mcq_callbacks")
    }
    names = list(config.logp_callback_datasets)
    named["logp_callback_datasets"] = [(f"logp_callback_datasets[{n!r}]", n) for n in names]
    for entries in named.values():
        for field, tag in entries:
            if len(tag.encode(errors="replace")) > MOST_TAG_BYTES or not tag.isprintable():
                yield field, f"{shown(tag)} cannot be part of a file's name; choose a short word"
        files = [tag.replace("/", "_") for _, tag in entries]
        for index, (field, _) in enumerate(entries):
            if files[index] in files[:index]:
                said = shown(files[index])
                yield field, f"{said} is the tag of an earlier one, too; give each a tag of its own"
    for field, name in named["logp_callback_datasets"]:
        if name in EVENT_KEYS:
            yield field, f"{name!r} has a meaning of its own in events; choose another name"


def full_problems(config: TrainingFields) -> Problems:
    """What training all weights excludes."""
    if config.is_peft:
        return
    if config.loss not in ("sft", "sdft"):
        yield (
            "is_peft",
            f"False trains all weights, which loss={config.loss!r} does not do; remove it to train "
            "a LoRA",
        )
    if config.load_in_4bit:
        yield "load_in_4bit", "weights in 4 bit cannot be trained; remove it, or is_peft=False"
    if config.engine == "unsloth":
        yield "engine", "'unsloth' trains a LoRA alone; use 'auto' beside is_peft=False"
    if config.kl_to_base_steps is not None:
        yield (
            "kl_to_base_steps",
            "needs the base model, which is not there any more when all weights are trained; "
            "remove it beside is_peft=False",
        )


def hub_problems(config: TrainingFields) -> Problems:
    """A name of the result that the hub would refuse, or that nothing fills in."""
    field, extra = "finetuned_model_id", config.model_naming_extra_parameters or {}
    try:
        names = _placeholders(config.finetuned_model_id)
    except ValueError as error:
        yield field, str(error)
        return
    if unknown := sorted(names - {"org_id", "model_name", "job_id", *extra}):
        yield (
            field,
            f"holds {{{unknown[0]}}}, which nothing fills in; use org_id, model_name, job_id or a "
            "name of model_naming_extra_parameters",
        )
    org, _, name = config.finetuned_model_id.partition("/")
    if not org.strip() or not name.strip() or "/" in name:
        yield field, f"{shown(config.finetuned_model_id)} must be org/name; give both parts"
    elif org in ("datasets", "models", "unsloth", "None"):
        yield field, f"{org!r} is no organization of yours; begin with your own, or with {{org_id}}"


def _placeholders(template: str) -> set[str]:
    """Names in braces; a name with a format or a conversion counts as a name of its own."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"has a stray brace ({error}); write {{{{ and }}}} for braces") from None
    return {
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    }


def test_set_problems(config: TrainingFields) -> Problems:
    """When to evaluate, and on what."""
    steps, strategy = config.test_file_eval_steps, config.test_file_eval_strategy
    if config.holdout_fraction is not None and config.test_file is not None:
        yield "holdout_fraction", "stands beside test_file; remove one of the two"
    if steps is not None and strategy != "steps":
        yield "test_file_eval_steps", "only counts with test_file_eval_strategy='steps'; set that"
    if strategy == "steps" and steps is None:
        yield (
            "test_file_eval_strategy",
            "'steps' needs test_file_eval_steps; give a number of steps",
        )
    if strategy == "steps" and not config.has_test_set:
        yield (
            "test_file_eval_strategy",
            "'steps' has no test_file to evaluate; give test_file, or remove it",
        )
    if steps is not None and steps > 1 and steps != int(steps):
        yield (
            "test_file_eval_steps",
            f"is {steps}; give a whole number of steps, or a share of all below 1",
        )


def preference_problems(config: TrainingFields) -> Problems:
    """What dpo and orpo cannot do."""
    if config.loss in ("dpo", "orpo") and config.beta == 0:
        yield "beta", f"must be greater than 0 for loss={config.loss!r}; give some, such as 0.1"
    if config.loss == "dpo" and config.lora_bias != "none":
        yield (
            "lora_bias",
            "'all' trains the base model's own biases, so that nothing would be left to compare "
            "with; remove it for loss='dpo'",
        )


def sdft_problems(config: TrainingFields) -> Problems:
    """What sdft cannot do."""
    if config.loss != "sdft":
        return
    if config.sdft_demo_repeats != 1 and config.sdft_demo_placement != "turns":
        yield (
            "sdft_demo_repeats",
            "only counts with sdft_demo_placement='turns'; set that, or remove it",
        )
    if config.sdft_demo_template is not None and config.sdft_demo_placement == "turns":
        yield (
            "sdft_demo_template",
            "is not used with sdft_demo_placement='turns'; remove one of the two",
        )
    if config.sdft_max_new_tokens >= config.max_seq_length:
        yield (
            "sdft_max_new_tokens",
            f"is {config.sdft_max_new_tokens}, which leaves no room for a prompt within "
            f"max_seq_length={config.max_seq_length}; lower it, or raise max_seq_length",
        )
    if config.sdft_skip_tokens >= config.sdft_max_new_tokens:
        yield (
            "sdft_skip_tokens",
            f"is {config.sdft_skip_tokens} of at most {config.sdft_max_new_tokens} tokens, so "
            "nothing would be learned; lower it",
        )


def spreading_problems(config: TrainingFields) -> Problems:
    """Why the model's layers cannot be spread over GPUs, as (field, what; what to do)."""
    if config.loss == "grpo":
        yield "parallel", "'fsdp' is for sft, sdft, dpo and orpo; use 'ddp' for grpo"
    if not config.is_peft:
        yield "parallel", "'fsdp' trains adapters; use 'ddp' to train all weights"
    if config.engine == "unsloth":
        yield "engine", "'unsloth' needs the whole model on each GPU; use 'auto' or 'transformers'"
    if config.loss == "sdft" and config.sdft_rollout_engine in ("cuda_graph", "vllm"):
        yield (
            "sdft_rollout_engine",
            f"{config.sdft_rollout_engine!r} needs the whole model on each GPU, which "
            "parallel='fsdp' spreads; use 'auto' or 'transformers'",
        )
    if config.rollout_precision == "fp8":
        yield (
            "rollout_precision",
            "'fp8' is for the engine cuda_graph, which parallel='fsdp' cannot use; remove it",
        )


def grpo_problems(config: TrainingFields) -> Problems:
    """What is wrong between the fields of a grpo config, as (field, what; what to do)."""
    if config.loss != "grpo":
        return
    yield from _batch_problems(config)
    if config.grpo_max_completion_length >= config.max_seq_length:
        yield (
            "grpo_max_completion_length",
            f"is {config.grpo_max_completion_length}, which leaves no room for a prompt within "
            f"max_seq_length={config.max_seq_length}; lower it, or raise max_seq_length",
        )
    names = {choice.name for choice in reward_choices(config.grpo_reward_function)}
    judged = {
        "grpo_judge_model": config.grpo_judge_model != DEFAULT_JUDGE,
        "grpo_judge_prompt": config.grpo_judge_prompt is not None,
        "grpo_judge_best": config.grpo_judge_best != BEST,
    }
    judges = " or ".join(repr(name) for name in JUDGES)
    for field, is_set in judged.items():
        if is_set and not names & set(JUDGES):
            yield field, f"only counts with {judges} in grpo_reward_function; remove it, or add one"
    if config.grpo_judge_best != BEST and config.grpo_judge_prompt is None:
        yield "grpo_judge_best", "is the scale of grpo_judge_prompt; give that, or remove it"
    if config.beta > 0 and config.lora_bias == "all":
        yield (
            "lora_bias",
            "'all' trains the base model's own biases, so that there is no reference model for "
            "beta; use lora_bias='none', or beta=0",
        )
    if config.grpo_use_vllm and config.engine == "unsloth":
        yield "grpo_use_vllm", "needs engine='transformers' or 'auto'; change one of the two"


def _batch_problems(config: TrainingFields) -> Problems:
    """A step of one process must hold whole groups; several processes then do, too."""
    group, batch = config.grpo_num_generations, config.step_size
    if batch % group:
        yield (
            "grpo_num_generations",
            f"is {group}, but a step has per_device_train_batch_size * gradient_accumulation_steps "
            f"= {batch} completions, which holds no whole number of groups; make it a multiple of "
            f"{group}",
        )
