"""How sure a mean over problems is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

RESAMPLES = 2000
# Of fewer values their spread says too little: an interval rests on the widest that there can be.
_FEW = 10


class Estimate(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(count: float, total: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's score interval (1927), which stays within 0 and 1 for rare events,
    too. With the sum of scores from 0 to 1 for `count` it is wider than it need be: of one mean
    those vary most that are 0 or 1.
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
    """A mean with the percentile interval of its bootstrap (Efron, 1979) over the values."""
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = (1 - level) / 2
    low, high = (means[round(share * (RESAMPLES - 1))] for share in (cut, 1 - cut))
    return Estimate(fmean(values), low, high)


def mean_score(scores: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of one score for each problem: Wilson's interval where all are 0 or 1, are few or
    are equal, else the bootstrap's, which is falsely certain there.
    """
    is_bounded = all(0 <= score <= 1 for score in scores)
    is_binary = all(score in (0.0, 1.0) for score in scores)
    if is_bounded and (is_binary or _says_no_spread(scores)):
        return wilson(sum(scores), len(scores), level)
    return bootstrap(scores, level)


def mean_difference(differences: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean difference of two models' scores on the same problems, with the adjusted Wald
    interval of paired shares (Bonett and Price, 2012): that of the normal distribution, with two
    more problems, of which each model has won one.

    They were won by 1, the most that scores from 0 to 1 can differ; of many scores that are not 0
    or 1 by the largest difference that there was. So neither few problems nor equal differences
    make it certain.
    """
    largest = max(map(abs, differences))
    is_binary = all(value in (-1.0, 0.0, 1.0) for value in differences)
    is_wide = is_binary or _says_no_spread(differences)
    reach = max(largest, 1.0) if is_wide else largest
    count = len(differences) + 2
    middle = sum(differences) / count
    squares = sum(value * value for value in differences) + 2 * reach * reach
    z = NormalDist().inv_cdf((1 + level) / 2)
    half = z * math.sqrt((squares / count - middle * middle) / count)
    end = max(largest, 1.0)
    return Estimate(fmean(differences), max(middle - half, -end), min(middle + half, end))


def _says_no_spread(values: Sequence[float]) -> bool:
    return len(values) < _FEW or len(set(values)) == 1
