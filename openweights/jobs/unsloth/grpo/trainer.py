"""Group-relative policy optimisation (GRPO, arXiv 2402.03300) as a `trl.GRPOTrainer`.

For each prompt the policy samples a group of completions; reward functions score them, and those
better than their siblings become more likely:

    L = - mean over tokens of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) + beta * KL

with A from `advantages.py`, and KL times the ratio, so that its gradient is that of the reverse KL
(trl's `use_bias_correction_kl`). Where we differ from trl: a completion of which one reward failed
has no reward at all (trl would count the failed part as 0), a step without any two comparable
rewards leaves weights and optimizer as they are, completions are sampled without dropout, rows are
padded on the right where gradients flow (`completion_logps.py`), and the reference model is the
base under disabled adapters, so that no copy of them is kept or saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from openweights.events import Completions
from openweights.jobs.unsloth.grpo.advantages import FailedRewards, group_advantages, has_signal
from openweights.jobs.unsloth.grpo.completion_logps import completion_logps
from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions
from openweights.jobs.unsloth.rewards import Samples
from openweights.models.forward import evaluating

COMPLETIONS_EVERY_STEPS = 10
COMPLETIONS_LOGGED = 4

LogEvent = Callable[[dict[str, Any]], None]


class RewardTrainer(GRPOTrainer):
    """`GRPOTrainer` whose completions are scored by a `RewardFunctions`.

    Args:
        model: A `PeftModel` with a fresh adapter.
        args: With `beta` 0 whatever beta is: else trl would add a copy of the adapter to the model.
        beta: Weight of the KL divergence to the base model.
        functions: The rewards.
        rows: What the `row` of the datasets points to.
        failed: Watches over failed rewards.
        packs_rows: Whether the engine sees to padding itself.
        log_event: Receives completions with their rewards as JSON.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GRPOConfig,
        *,
        beta: float,
        functions: RewardFunctions,
        rows: Sequence[Mapping[str, Any]],
        failed: FailedRewards,
        think_end_tag: str,
        packs_rows: bool,
        log_event: LogEvent,
        **kwargs: Any,
    ) -> None:
        args.reward_weights = [reward.weight for reward in functions.rewards]
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            reward_funcs=[_name_holder(reward.name) for reward in functions.rewards],
            **kwargs,
        )
        self.beta = beta
        self._policy = model
        self.has_signal = True
        self._functions = functions
        self._rows = rows
        self._failed = failed
        self._think_end_tag = think_end_tag
        self._packs_rows = packs_rows
        self._log_event = log_event
        self._rewards: Tensor = torch.empty(0)
        self._is_training = True
        self.add_callback(SkipEmptySteps(self))

    # ---- rollouts and rewards: once per optimizer step

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self._policy):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Rewards of all ranks, shape (N, functions); NaN in a whole row where one failed."""
        texts = self._tokenizer.batch_decode(completion_ids_list, skip_special_tokens=True)
        samples = Samples(
            # unsloth gives rendered prompts.
            prompts=[row["prompt"] for row in inputs],
            completions=texts,
            completion_ids=completion_ids_list,
            rows=[self._rows[row["row"]] for row in inputs],
            think_end_tag=self._think_end_tag,
        )
        own = torch.tensor(self._functions.score(samples), device=self.accelerator.device).T
        scores: Tensor = gather(own.contiguous())  # type: ignore[assignment]
        scores[scores.isnan().any(1)] = torch.nan
        self._rewards = (scores * self.reward_weights.to(scores.device)).sum(1)
        missing = int(self._rewards.isnan().sum())
        mode = "train" if self._is_training else "eval"
        self._metrics[mode]["failed_fraction"].append(missing / len(self._rewards))
        if self._is_training:
            self._log_completions(samples, own)
            self._failed.record(self.state.global_step, missing, len(self._rewards))
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """trl's, with our own advantages."""
        # Asked before: generation may leave the model in another mode.
        self._is_training = self._policy.training
        output = super()._generate_and_score_completions(inputs)
        size = int((self.num_generations if self._is_training else self.num_generations_eval) or 1)
        scale: Any = self.scale_rewards
        advantages = group_advantages(self._rewards, size, scale)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[first : first + len(inputs)]
        if self._is_training:
            self.has_signal = has_signal(self._rewards, size)
        return output

    def _log_completions(self, samples: Samples, scores: Tensor) -> None:
        """Every so many steps, log some completions with what they earned."""
        step = self.state.global_step
        if step % COMPLETIONS_EVERY_STEPS or self.args.process_index:
            return
        names = [reward.name for reward in self._functions.rewards]
        logged = []
        for index in range(min(COMPLETIONS_LOGGED, len(samples.completions))):
            values = [None if v != v else v for v in scores[index].tolist()]  # noqa: PLR0124 - NaN
            logged.append(
                {
                    "prompt": samples.prompts[index][-1]["content"],
                    "completion": samples.completions[index],
                    "rewards": dict(zip(names, values, strict=True)),
                }
            )
        self._log_event(Completions(step=step, completions=logged).data())

    # ---- scoring: once per micro-batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Ours, but for engines that see to padding and models with a loss of their routers."""
        if self._packs_rows or kwargs.get("compute_aux_loss"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._unpadded_logps(*args, **kwargs)

    def _unpadded_logps(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities and entropies of shape (B, C), and no auxiliary loss."""
        size = batch_size or len(input_ids)
        parts = [
            completion_logps(
                model,
                input_ids[start : start + size],
                attention_mask[start : start + size],
                logits_to_keep,
                temperature=self.temperature,
                entropy=compute_entropy,
                keeps_logits="logits_to_keep" in self.model_kwarg_keys,
            )
            for start in range(0, len(input_ids), size)
        ]
        entropies = [entropy for _, entropy in parts if entropy is not None]
        return (
            torch.cat([logps for logps, _ in parts]),
            torch.cat(entropies) if entropies else None,
            None,
        )


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
