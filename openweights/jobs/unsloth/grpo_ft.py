"""A GRPO run: its rewards, its arguments, and the trainer (`grpo/trainer.py`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig

from openweights.errors import ConfigurationError
from openweights.generation.choose import generation_engine
from openweights.jobs.unsloth.config.grpo_fields import (
    JUDGES,
    RewardChoice,
    reward_choices,
)
from openweights.jobs.unsloth.config.rows import Row, check_prompt_count, prompts_in_step
from openweights.jobs.unsloth.grpo.advantages import FailedRewards
from openweights.jobs.unsloth.grpo.data import grpo_rows
from openweights.jobs.unsloth.grpo.judge_parsing import JudgeLimits, JudgeQuestion
from openweights.jobs.unsloth.grpo.reward_functions import (
    REASONING,
    RewardFunctions,
    own_reward,
    reasoning_reward,
)
from openweights.jobs.unsloth.grpo.trainer import RewardTrainer
from openweights.jobs.unsloth.rewards import OVERLONG, Reward, overlong_reward, text_reward
from openweights.jobs.unsloth.rollout import grpo_sampling_params
from openweights.jobs.unsloth.runtime.memory import RecomputationCallback
from openweights.jobs.unsloth.runtime.reporting import Fetch, LogEvent
from openweights.jobs.unsloth.trainer_args import arguments, run_trainer
from openweights.jobs.unsloth.validate import TrainingConfig
from openweights.models.load import TrainingEngine
from openweights.models.packing import may_pack
from openweights.models.templates.rendering import prompt_token_ids

logger = logging.getLogger(__name__)

GRACE_S = 5.0  # from the judges' own deadline to the end of our patience with them


def grpo_train(
    config: TrainingConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row] | None,
    *,
    fetch: Fetch,
    log_event: LogEvent,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from: str | None = None,
    engine: TrainingEngine = "transformers",
    limits: JudgeLimits | None = None,
) -> RewardTrainer:
    """Train `model` by GRPO on the prompts of `conversations` rows and return the trainer.

    Args:
        test_rows: Their prompts are answered once each, and the rewards logged as `eval_reward`.
        fetch: Makes the file of a reward function readable.
        log_event: Receives completions with their rewards as JSON.
        resume_from: Folder of a checkpoint.
        engine: What trains.
        limits: How long judges may take.

    Raises:
        ConfigError: A reward function cannot be used.
        ConfigurationError: vLLM or the key of a judge's API is missing here.
        DatasetError: A row cannot be used, or there are too few prompts for a step.
        JobFailedError: Rewards keep failing.
    """
    limits = limits or JudgeLimits()
    train = grpo_rows(config, tokenizer, train_rows)
    test = None
    if test_rows:
        test = grpo_rows(config, tokenizer, test_rows, name="test_file", first=len(train.rows))
    rewards = [
        _reward(choice, config, model, tokenizer, fetch, limits)
        for choice in reward_choices(config.grpo_reward_function)
    ]
    args = grpo_args(config, engine)
    rollouts = generation_engine(
        "vllm" if config.grpo_use_vllm else "auto",
        model,
        tokenizer,
        precision=config.rollout_precision,
        scaled_logprobs=True,
    )
    _check_prompts(config, len(train.rows), args.world_size)
    trainer = RewardTrainer(
        model,
        args,
        beta=config.beta,
        functions=RewardFunctions(rewards, limit_s=limits.total_s + GRACE_S),
        prompts=[*train.prompts, *(test.prompts if test else [])],
        rows=[*train.rows, *(test.rows if test else [])],
        failed=FailedRewards(rewards, config.grpo_max_failed_reward_fraction),
        think_end_tag=config.grpo_think_end_tag,
        packed=None
        if engine == "unsloth"
        else may_pack(model, [{"input_ids": prompt.ids} for prompt in train.prompts]),
        engine=rollouts,
        sampling=grpo_sampling_params(config, tokenizer, rollouts.end_token_ids),
        log_event=log_event,
        train_dataset=train.dataset,
        eval_dataset=test.dataset if test else None,
        processing_class=tokenizer,
        callbacks=[*callbacks, RecomputationCallback(config.memory_budget_gb)],
    )
    return run_trainer(trainer, resume_from)


def grpo_args(config: TrainingConfig, engine: TrainingEngine = "transformers") -> GRPOConfig:
    """The trainer's arguments.

    Raises:
        ConfigurationError: vLLM was asked for, and is not installed here.
    """
    if config.grpo_use_vllm and importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "grpo_use_vllm: vLLM is not installed where the job runs; remove it, or use an image "
            "that has it"
        )
    rows, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if engine == "unsloth" and rows % config.grpo_num_generations:
        # unsloth would raise the rows to a whole group, and with them the size of a step.
        rows = config.grpo_num_generations
        accumulation = config.step_size // rows
    return arguments(
        GRPOConfig,
        config,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        beta=0.0,
        num_generations=config.grpo_num_generations,
        num_generations_eval=1,
        max_completion_length=config.grpo_max_completion_length,
        temperature=config.grpo_temperature,
        top_p=config.grpo_top_p,
        # Said although they are trl's defaults: unsloth puts others in their place for dapo.
        epsilon=config.grpo_epsilon,
        epsilon_high=config.grpo_epsilon,
        mask_truncated_completions=False,
        loss_type=config.grpo_loss_type,
        scale_rewards=config.grpo_scale_rewards,
    )


def _check_prompts(config: TrainingConfig, prompts: int, ranks: int) -> None:
    """See that trl, which leaves out what does not fill a step, does not leave out everything."""
    check_prompt_count(config, prompts, ranks)
    taken = prompts_in_step(config, ranks)
    if rest := prompts % taken:
        logger.warning(
            "training_file: %d prompts in steps of %d: %d of them, others in each epoch, fill no "
            "step and are not answered in it",
            prompts,
            taken,
            rest,
        )


def _reward(
    choice: RewardChoice,
    config: TrainingConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    fetch: Fetch,
    limits: JudgeLimits,
) -> Reward:
    if choice.file is not None:
        path = fetch(choice.file, Path("data") / f"reward_{choice.name}.py")
        return own_reward(path, choice.name, choice.weight)
    if choice.name in JUDGES:
        from openweights.jobs.unsloth.judges import Judge

        asked = JudgeQuestion(choice.name, config.grpo_judge_prompt, config.grpo_judge_best)  # type: ignore[arg-type]
        return Judge(asked, config.grpo_judge_model, limits).reward(choice.weight)
    if choice.name == REASONING:
        return reasoning_reward(
            model,
            tokenizer,
            choice.weight,
            prompt_ids=lambda prompt: prompt_token_ids(tokenizer, prompt),
            batch_size=config.per_device_train_batch_size,
        )
    if choice.name == OVERLONG:
        return overlong_reward(config.grpo_max_completion_length, choice.weight)
    return text_reward(choice.name, choice.weight)
