"""Odds-ratio preference optimisation (ORPO, arXiv 2403.07691, equations 6 and 7).

    L = mean over pairs of (- log P(chosen) - beta * log sigmoid(odds(chosen) - odds(rejected)))
    odds(y) = log P(y) - log(1 - P(y))

where log P(y) is the mean log-probability of an answer's tokens. There is no reference model. trl's
ORPO takes the first term over the prompt, too, and over all tokens of a batch alike; here it is
that of the paper, the same log P(chosen) as in the odds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from openweights.jobs.unsloth.dpo_ft import reward_metrics
from openweights.jobs.unsloth.runtime.step_mean import SummedLoss
from openweights.models.log_probs import answer_log_probs

# An answer that is certain has infinite odds; its mean log-probability counts as this at most.
LARGEST_LOG_P = -1e-6


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of probabilities given as logarithms."""
    log_p = log_p.clamp(max=LARGEST_LOG_P)
    # The first form loses digits for small p, the second for p near 1.
    near_one = torch.log(-torch.expm1(log_p))
    small = torch.log1p(-torch.exp(log_p))
    return log_p - torch.where(log_p > -math.log(2), near_one, small)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Loss of each pair.

    Args:
        chosen, rejected: Mean log-probability per token of the answers, shape (B,).
    """
    return -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def summed_orpo_loss(model: nn.Module, batch: Mapping[str, Tensor], *, beta: float) -> SummedLoss:
    """`orpo_loss` summed over the pairs of a `PreferenceCollator` batch."""
    sums, tokens = answer_log_probs(model, batch)
    chosen, rejected = (sums / tokens).chunk(2)
    with torch.no_grad():
        ratio = log_odds(chosen) - log_odds(rejected)
        metrics = reward_metrics(beta * chosen, beta * rejected) | {
            "logps/chosen": float(chosen.sum()),
            "logps/rejected": float(rejected.sum()),
            "nll_loss": float(-chosen.sum()),
            "log_odds_chosen": float(ratio.sum()),
            "log_odds_ratio": float(logsigmoid(ratio).sum()),
        }
    return SummedLoss(orpo_loss(chosen, rejected, beta).sum(), metrics)
