"""How sure a mean over problems is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(count: int, total: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's score interval (1927), which stays within 0 and 1 for rare events,
    too.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    value, scale = count / total, 1 + z * z / total
    middle = (value + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(value * (1 - value) / total + z * z / (4 * total * total))
    # At the ends the bound is the share itself, but for rounding.
    low = middle - half if count else 0.0
    high = middle + half if count < total else 1.0
    return Estimate(value, low, high)


def bootstrap(values: Sequence[float], level: float = 0.95, *, seed: int = 0) -> Estimate:
    """A mean with the percentile interval of its bootstrap (Efron, 1979) over the values.

    Of differences between two models on the same problems it is the paired comparison.
    """
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = (1 - level) / 2
    low, high = (means[round(share * (RESAMPLES - 1))] for share in (cut, 1 - cut))
    return Estimate(fmean(values), low, high)


def mean_score(scores: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of one score for each problem: Wilson's interval where all are 0 or 1, else the
    bootstrap's.
    """
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(round(sum(scores)), len(scores), level)
    return bootstrap(scores, level)
