"""Group-relative policy optimisation (GRPO, arXiv 2402.03300) as a `trl.GRPOTrainer`.

For each prompt the policy samples a group of completions; reward functions score them, and those
better than their siblings become more likely:

    L = - mean over tokens of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) + beta * KL

with A from `advantages.py`, and KL times the ratio, so that its gradient is that of the reverse KL
(trl's `use_bias_correction_kl`). Where we differ from trl: a completion of which one reward failed
has no reward at all (trl would count the failed part as 0), a step without any two comparable
rewards leaves weights and optimizer as they are, completions come from a generation engine, rows
are laid end to end where gradients flow (`completion_logps.py`), or padded to similar lengths,
several ranks score equally many tokens each, and no copy of the adapter is added to the model: the
reference is the base model, or the adapter that training goes on from. An engine that does not
compute with the trainer's own weights (`is_exact`) tells the old policy's log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from openweights.events import Completions
from openweights.generation.engine import GenerationEngine
from openweights.generation.params import Completion, SamplingParams
from openweights.jobs.unsloth.config.examples import Prompt
from openweights.jobs.unsloth.config.grpo_fields import REWARD_SCALES
from openweights.jobs.unsloth.grpo.advantages import FailedRewards, group_advantages, has_signal
from openweights.jobs.unsloth.grpo.completion_logps import completion_logps
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions
from openweights.jobs.unsloth.rewards import Samples
from openweights.jobs.unsloth.rollout import (
    COMPLETIONS_LOGGED,
    Rollout,
    StepSampler,
    tells_completions,
)
from openweights.jobs.unsloth.runtime.ranks import (
    average_gradients,
    of_all_ranks,
    own_share,
    rows_of_step,
    world_size,
)
from openweights.jobs.unsloth.runtime.reporting import LogEvent
from openweights.models.forward import active_adapter, base_model
from openweights.models.weights import Reference, keeping_precision


class RewardTrainer(GRPOTrainer):
    """`GRPOTrainer` whose completions are scored by a `RewardFunctions`.

    Args:
        model: A `PeftModel`.
        args: With `beta` 0 whatever beta is: else trl would add a copy of the adapter to the model.
        beta: Weight of the KL divergence to the model that training started from.
        functions: The rewards.
        prompts, rows: What the `row` of the datasets points to.
        failed: Watches over failed rewards.
        packed: Whether rows are scored end to end; None where the training engine sees to that.
        engine: Draws the completions.
        sampling: How; with `skip_special_tokens` the rewards do not see them.
        log_event: Receives completions with their rewards as JSON.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GRPOConfig,
        *,
        beta: float,
        functions: RewardFunctions,
        prompts: Sequence[Prompt],
        rows: Sequence[Mapping[str, Any]],
        failed: FailedRewards,
        think_end_tag: str,
        packed: bool | None,
        engine: GenerationEngine,
        sampling: SamplingParams,
        log_event: LogEvent,
        **kwargs: Any,
    ) -> None:
        args.reward_weights = [reward.weight for reward in functions.rewards]
        with keeping_precision(model):
            super().__init__(
                model=model,  # type: ignore[arg-type]
                args=args,
                reward_funcs=[_name_holder(reward.name) for reward in functions.rewards],
                **kwargs,
            )
        # No loss of a mixture's routers, as under the other losses.
        self.aux_loss_enabled &= packed is None
        self.beta = beta
        self._policy = model
        if beta and not (reference := Reference(model)).is_base:
            # Else trl switches the adapter off by itself.
            self.ref_model = _ReferenceModel(model, reference)
        self.has_signal = True
        self._functions = functions
        self._prompts = prompts
        self._rows = rows
        self._failed = failed
        self._think_end_tag = think_end_tag
        self._packed = packed
        self._engine = engine
        self._sampler = StepSampler(engine, sampling)
        self._sampling = sampling
        self._logps: Tensor | None = None  # of the policy, in the forward before last loss
        self._log_event = log_event
        self._is_training = True
        # Of the step, or the batch that is evaluated: the rows that are scored here, with their
        # completions, and the rewards of those of all ranks.
        self._shared: list[tuple[Prompt, Completion]] = []
        self._scores: Tensor = torch.empty(0)
        self.add_callback(SkipEmptySteps(self))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: trl would write one at each checkpoint, and a result has its own (`model_card`)."""

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        """trl's order of prompts, drawn anew from seed and epoch, so that a resumed run sees the
        rows that would have come.
        """
        plain: Any = super()._get_train_sampler(dataset)
        return EpochSampler(
            data_source=plain.data_source,
            mini_repeat_count=plain.mini_repeat_count,
            batch_size=plain.batch_size,
            repeat_count=plain.repeat_count,
            shuffle=plain.shuffle,
            seed=plain.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    # ---- rollouts and rewards: once per optimizer step

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """trl's, but where rows are padded without a shuffle: a micro-batch has rows of similar
        lengths, as it is as wide as its longest. (Their means count equally in "bnpo", to which
        lengths must not matter.)
        """
        if self._packed is not False or self.loss_type == "bnpo":
            return super()._prepare_inputs(generation_batch)
        if not self._policy.training:
            return self._generate_and_score_completions(generation_batch)
        args: Any = self.args
        parts = args.steps_per_generation
        if self._step % parts == 0 or self._buffered_inputs is None:
            step = by_length(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = split_tensor_dict(step, parts)
        return self._buffered_inputs[self._step % parts]  # type: ignore[no-any-return]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """trl's, with our own completions, rewards and advantages.

        Each rank samples whole groups and rewards what it has sampled. Then the completions are
        dealt by their lengths, so that all have equally many tokens to score.
        """
        # Asked before: generation may leave the model in another mode.
        self._is_training = self._policy.training
        asked = rows_of_step([inputs])
        prompts = [self._prompts[row["row"]] for row in asked]
        rollout = self._roll_out(prompts)
        self._scores = self._rewarded(asked, rollout)
        tokens = [
            len(prompt.ids) + len(completion.token_ids)
            for prompt, completion in zip(prompts, rollout.completions, strict=True)
        ]
        share = sorted(own_share(tokens))
        self._shared = [(prompts[index], rollout.completions[index]) for index in share]
        output = super()._generate_and_score_completions([asked[index] for index in share])
        size = int((self.num_generations if self._is_training else self.num_generations_eval) or 1)
        scale: Any = self.scale_rewards
        rewards = (self._scores * self.reward_weights.to(self._scores.device)).sum(1)
        output["advantages"] = group_advantages(rewards, size, scale)[share].float()
        if not self._engine.is_exact:
            # Then the ratio of the loss is an importance weight, by the trainer's own weights.
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        if self._is_training:
            self.has_signal = has_signal(rewards, size)
        return output

    def _roll_out(self, prompts: Sequence[Prompt]) -> Rollout:
        """Completions of the prompts of all ranks."""
        seed = (self.args.seed, self.state.global_step, int(self._is_training))
        adapter = active_adapter(self._policy)
        rollout = self._sampler.sample([prompt.ids for prompt in prompts], adapter, seed=seed)
        metrics = self._metrics["train" if self._is_training else "eval"]
        count = len(rollout.completions)
        metrics["truncated_share"].append((count - rollout.ended) / count)
        metrics["rollout_s"].append(rollout.seconds)
        metrics["rollout_tokens_per_s"].append(rollout.tokens / rollout.seconds)
        if world_size() > 1:
            waiting = sum(of_all_ranks(rollout.waiting_s)) / world_size()
            metrics["rollout_waiting_s"].append(waiting)
        return rollout

    def _rewarded(self, asked: Sequence[Mapping[str, Any]], rollout: Rollout) -> Tensor:
        """Rewards of all completions, shape (N, functions); NaN in a whole row where one failed."""
        found = dict(chain(*of_all_ranks(self._own_rewards(asked, rollout))))
        device = self.accelerator.device
        # In 64 bits: rewards of a million may differ by a thousandth.
        values = [found[index] for index in range(len(asked))]
        scores = torch.tensor(values, dtype=torch.float64, device=device)
        if self._is_training:
            self._log_completions(asked, rollout, scores)
        scores[scores.isnan().any(1)] = torch.nan
        missing = int(scores.isnan().any(1).sum())
        mode = "train" if self._is_training else "eval"
        self._metrics[mode]["failed_fraction"].append(missing / len(scores))
        if self._is_training:
            self._failed.record(self.state.global_step, missing, len(scores))
        return scores

    def _own_rewards(
        self, asked: Sequence[Mapping[str, Any]], rollout: Rollout
    ) -> list[tuple[int, tuple[float, ...]]]:
        """By index, the rewards of what was sampled here."""
        if not rollout.own:
            return []
        own = [rollout.completions[index] for index in rollout.own]
        samples = self._samples([asked[index] for index in rollout.own], own)
        by_row = zip(*self._functions.score(samples), strict=True)
        return list(zip(rollout.own, by_row, strict=True))

    def _samples(self, asked: Sequence[Mapping[str, Any]], own: Sequence[Completion]) -> Samples:
        """Completions with what was asked, as rewards read them."""
        ids = [completion.token_ids for completion in own]
        return Samples(
            prompts=[self._prompts[row["row"]].messages for row in asked],
            completions=self._tokenizer.batch_decode(
                ids, skip_special_tokens=self._sampling.skip_special_tokens
            ),
            completion_ids=ids,
            rows=[self._rows[row["row"]] for row in asked],
            think_end_tag=self._think_end_tag,
        )

    def _log_completions(
        self, asked: Sequence[Mapping[str, Any]], rollout: Rollout, scores: Tensor
    ) -> None:
        """At some steps, log some completions with what they earned."""
        step = self.state.global_step
        if not tells_completions(step, self.state.max_steps) or self.args.process_index:
            return
        first = slice(COMPLETIONS_LOGGED)
        samples = self._samples(asked[first], rollout.completions[first])
        names = [reward.name for reward in self._functions.rewards]
        logged = []
        for prompt, completion, row in zip(
            samples.prompts, samples.completions, scores[first].tolist(), strict=True
        ):
            values = [None if math.isnan(value) else value for value in row]
            logged.append(
                {
                    "prompt": prompt[-1]["content"],
                    "messages": prompt,
                    "completion": completion,
                    "rewards": dict(zip(names, values, strict=True)),
                }
            )
        scales = {name: REWARD_SCALES[name] for name in names if name in REWARD_SCALES} or None
        event = Completions(step=step + 1, completions=logged, scales=scales)
        self._log_event(event.data())

    # ---- what trl asks for on the way: all of it is there already

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """As every prompt is rendered here, not by trl."""
        return [prompt.ids for prompt, _ in self._shared], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """A completion of each prompt, and the log-probabilities that it was drawn with."""
        ids = [completion.token_ids for _, completion in self._shared]
        # An engine that packs rows has a use of its own for them.
        logps = [completion.logprobs for _, completion in self._shared]
        return ids, None if self._packed is None else logps

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Rewards of all ranks, group by group, shape (N, functions)."""
        return self._scores.clone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """trl's, with the rewards under their older names, too: `rewards/<name>_reward/mean`."""
        metrics = self._metrics["train" if self._policy.training else "eval"]
        if not self._policy.training:
            # A prompt of the test set is answered once: groups of one say nothing of their spread.
            metrics.pop("frac_reward_zero_std", None)
        for name in [reward.name for reward in self._functions.rewards]:
            for part in ("mean", "std"):
                if values := metrics.get(f"rewards/{name}/{part}"):
                    metrics.setdefault(f"rewards/{name}_reward/{part}", list(values))
        super().log(logs, start_time)

    # ---- scoring: once per micro-batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """As our scoring does not pass through DDP's forward, the last micro-batch of a step
        averages the gradients over the ranks here; where trl's scoring does, DDP has.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._packed is not None and self.accelerator.sync_gradients:
            average_gradients(self._policy, self.accelerator)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Log-probabilities and entropies of shape (B, C), and no auxiliary loss.

        trl's for an engine that sees to padding itself.
        """
        if self._packed is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        acting = model.acting() if isinstance(model, _ReferenceModel) else nullcontext()
        with acting, self.accelerator.autocast():
            logps, entropies = completion_logps(
                base_model(self._policy),
                input_ids,
                attention_mask,
                logits_to_keep,
                temperature=self.temperature,
                packed=self._packed,
            )
        if torch.is_grad_enabled():  # else it is the reference, or of all micro-batches
            self._logps = logps.detach()
        return logps, entropies, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """trl's; and how far the policy that sampled is from the one that is trained."""
        loss = super()._compute_loss(model, inputs)
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and self._logps is not None and model.training:
            kl = sampling_kl(sampled, self._logps, inputs["completion_mask"].bool())
            self._metrics["train"]["sampling_kl"].append(kl)
        return loss


def by_length(step: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a step, the longest first."""
    tokens = step["prompt_mask"].sum(1) + step["completion_mask"].sum(1)
    order = tokens.argsort(descending=True, stable=True)
    return {name: value[order] if value.dim() else value for name, value in step.items()}


def sampling_kl(sampled: Tensor, trained: Tensor, counted: Tensor) -> float:
    """KL(sampling policy || trained policy) per token in nats, estimated from the samples.

    The mean of r - 1 - log r with r = trained / sampling probability, which is never negative
    (J. Schulman, "Approximating KL divergence", 2020).

    Args:
        sampled, trained: Log-probabilities, shape (B, C).
        counted: Which tokens, shape (B, C).
    """
    log_ratio = (trained - sampled)[counted].double()
    return float((log_ratio.exp() - 1 - log_ratio).mean())


class EpochSampler(RepeatSampler):
    """trl's sampler, whose order is a function of the seed and the epoch alone.

    trl's own goes on with one generator, which a resumed run has at its start again.
    """

    def __init__(self, *, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(int(self.seed or 0) + self._epoch())
        return super().__iter__()


class _ReferenceModel(nn.Module):
    """What trl asks for the reference's logits: the policy with the weights it started from."""

    def __init__(self, policy: nn.Module, reference: Reference) -> None:
        super().__init__()
        # In a list, so that the policy's parameters do not count as this module's.
        self._policy, self._reference = [policy], reference

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that it started from."""
        return self._reference.acting()

    def forward(self, **inputs: Any) -> Any:
        with self.acting():
            return self._policy[0](**inputs)


class SkipEmptySteps(TrainerCallback):
    """A step without any two comparable rewards changes nothing.

    Without gradients an optimizer passes its parameters by: no weight decay, no momentum.
    """

    def __init__(self, trainer: RewardTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._trainer.has_signal:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None


def _name_holder(name: str) -> Callable[..., Any]:
    """What trl is given for each reward; it reads the name, the `RewardFunctions` does the work."""

    def reward(**_: Any) -> list[None]:
        return []

    reward.__name__ = name
    return reward
