"""Direct preference optimisation (DPO, arXiv 2305.18290, equation 7).

    L = - mean over pairs of log sigmoid(beta * ((log p(chosen) - log p_ref(chosen))
                                                 - (log p(rejected) - log p_ref(rejected))))

with the log-probabilities summed over an answer's tokens. The reference is the model that training
started from: the base model, or the adapter that it goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid

from openweights.jobs.unsloth.runtime.step_mean import SummedLoss
from openweights.models.log_probs import answer_log_probs
from openweights.models.weights import Reference


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Loss of each pair.

    Args:
        chosen, rejected: Rewards of the answers, beta * (log p - log p_ref), shape (B,).
    """
    return -logsigmoid(chosen - rejected)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Sums over the pairs of their rewards, shape (B,), by the names that trl gives them."""
    return {
        "rewards/chosen": float(chosen.sum()),
        "rewards/rejected": float(rejected.sum()),
        "rewards/accuracies": float((chosen > rejected).sum()),
        "rewards/margins": float((chosen - rejected).sum()),
    }


def summed_dpo_loss(
    model: PeftModel, batch: Mapping[str, Tensor], *, beta: float, reference: Reference
) -> SummedLoss:
    """`dpo_loss` summed over the pairs of a `PreferenceCollator` batch."""
    with reference.acting():
        reference_values, _ = answer_log_probs(model, batch)
    values, _ = answer_log_probs(model, batch)
    rewards = beta * (values - reference_values)
    chosen, rejected = rewards.chunk(2)
    metrics = reward_metrics(chosen.detach(), rejected.detach())
    for name, logps in zip(("chosen", "rejected"), values.detach().chunk(2), strict=True):
        metrics[f"logps/{name}"] = float(logps.sum())
    return SummedLoss(dpo_loss(chosen, rejected).sum(), metrics)
