"""What the study found: runs, points, intervals, differences, and the choice of a rate."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from openweights.errors import InvalidInputError, in_a_line
from openweights.jobs.evaluate.intervals import (
    RESAMPLES,
    Estimate,
    mean_difference,
    mean_score,
)

LABELS = {
    "base": "base",
    "sft": "SFT",
    "sdft_forward": "SDFT, forward KL",
    "sdft_reverse": "SDFT, reverse KL",
    "sdft_frozen": "SDFT, frozen teacher",
    "sdft_skip": "SDFT, three tokens skipped",
    "sdft_template": "SDFT, in the template",
    "grpo": "GRPO",
    "sft_grpo": "SFT, then GRPO",
}
NEARLY_BEST = 0.95  # of the best score, for a rate to count as reaching it


@dataclass(frozen=True, slots=True)
class Run:
    """A model of the study, and what was measured of it.

    Attributes:
        stage: How many skills were taught so far; 0 of the base.
        scores: By skill: 0 or 1 for each held-out row.
        kept: By benchmark: 0 or 1 for each problem.
        kl: To the base, on everyday prompts, in nats a token.
        cost_s: Seconds of its training, of the last skill, as if it had had the machine for itself:
            each moment counts by the share of the jobs that ran.
        gate: What SDFT's teacher gate found: where the demonstration stood, and what student and
            teacher had right at the start and each time later.
        stopped: Why it did not complete; then nothing else was measured.
    """

    method: str
    rate: float
    seed: int
    stage: int
    job_id: str = ""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kept: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kl: float = 0.0
    cost_s: float = 0.0
    gate: Mapping[str, Any] = field(default_factory=dict)
    stopped: str = ""

    @property
    def key(self) -> tuple[str, float, int, int]:
        """What tells it from the others."""
        return self.method, self.rate, self.seed, self.stage

    @property
    def label(self) -> str:
        """Names it for people."""
        rate = f" {exact(self.rate)}, seed {self.seed}, stage {self.stage}" if self.stage else ""
        return LABELS[self.method] + rate

    def score(self, name: str) -> float:
        """The share of a skill's rows, or of a benchmark's problems, that are right."""
        return fmean(self.rows(name))

    def rows(self, name: str) -> Sequence[float]:
        """The scores themselves."""
        return self.scores[name] if name in self.scores else self.kept[name]

    def data(self) -> dict[str, Any]:
        """As JSON, with a digit for each row."""
        plain = {
            name: getattr(self, name) for name in ("method", "rate", "seed", "stage", "job_id")
        }
        digits = {
            name: {key: "".join(f"{int(score)}" for score in rows) for key, rows in own.items()}
            for name, own in (("scores", self.scores), ("kept", self.kept))
        }
        given = {"gate": self.gate, "stopped": self.stopped}
        found = {name: value for name, value in given.items() if value}
        if self.stopped:
            return {**plain, **found}
        return {
            **plain,
            **digits,
            "kl": round(self.kl, 5),
            "cost_s": round(self.cost_s, 1),
            **found,
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Run:
        """From `data()`."""
        rows = {
            name: {key: list(map(float, digits)) for key, digits in data[name].items()}
            for name in ("scores", "kept")
            if name in data
        }
        return cls(**{**data, **rows})


def exact(rate: float) -> str:
    """A learning rate, as 5e-5."""
    digits, power = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def read_results(path: Path) -> tuple[list[str], list[Run]]:
    """The skills, in the order of the sequence, and all runs of a `results.json`.

    Raises:
        InvalidInputError: It holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        skills, runs = list(data["study"]["skills"]), [Run.of(run) for run in data["runs"]]
        sizes = [_sizes(run) for run in runs if not run.stopped]
        if any(own != sizes[0] or not set(skills) <= own.keys() for own in sizes):
            raise ValueError("its runs have answered other rows")
        if unknown := {run.method for run in runs} - LABELS.keys():
            raise ValueError(f"methods {sorted(unknown)}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{path}: holds no results of this study ({in_a_line(error)}); give a results.json "
            "that it has written"
        ) from error
    return skills, runs


def _sizes(run: Run) -> dict[str, int]:
    """How many rows of each skill and benchmark a run has answered, which is one at least."""
    sizes = {name: len(rows) for own in (run.scores, run.kept) for name, rows in own.items()}
    if not all(sizes.values()):
        raise ValueError(f"{run.label} has answered no rows")
    return sizes


class Point(NamedTuple):
    """A method at a rate, over its seeds.

    Attributes:
        taught: The name of the new skill.
        runs: One for each seed.
    """

    method: str
    rate: float
    taught: str
    runs: list[Run]

    @property
    def skill(self) -> list[float]:
        """Of the new skill, one value for each seed."""
        return [run.score(self.taught) for run in self.runs]

    @property
    def kept(self) -> list[float]:
        """Of the first benchmark, likewise; empty without one."""
        return [run.score(name) for run in self.runs for name in list(run.kept)[:1]]

    @property
    def kl(self) -> list[float]:
        """To the base, likewise."""
        return [run.kl for run in self.runs]


def measured(runs: Iterable[Run]) -> list[Run]:
    """Those that completed."""
    return [run for run in runs if not run.stopped]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """By stage, method, rate and seed."""
    places = {method: place for place, method in enumerate(LABELS)}
    return sorted(runs, key=lambda run: (run.stage, places[run.method], run.rate, run.seed))


def frontier_points(runs: Iterable[Run], skill: str) -> list[Point]:
    """The base and every (method, rate) of the first stage."""
    points: dict[tuple[str, float], Point] = {}
    for run in runs:
        if run.stage <= 1:
            empty = Point(run.method, run.rate, skill, [])
            points.setdefault((run.method, run.rate), empty).runs.append(run)
    return list(points.values())


def chosen_rates(points: Sequence[Point]) -> dict[str, float]:
    """Of each method the rate that moved the model least of those that nearly reach its best."""
    chosen: dict[str, float] = {}
    for method in dict.fromkeys(point.method for point in points if point.method != "base"):
        own = [point for point in points if point.method == method]
        best = max(fmean(point.skill) for point in own)
        good = [point for point in own if fmean(point.skill) >= NEARLY_BEST * best]
        chosen[method] = min(good, key=lambda point: fmean(point.kl)).rate
    return chosen


# ---- how sure ------------------------------------------------------------------------------------


def estimate(runs: Sequence[Run], name: str, *, seed: int = 0) -> Estimate:
    """A skill's or benchmark's score over seeds, with a 95 % interval.

    Of one seed it is that over rows. Of several the bootstrap draws seeds, and of each its rows, so
    that the interval knows of both; where no draw differs, it is that over rows again, which is
    never without a width.
    """
    return _estimated(tuple(tuple(run.rows(name)) for run in runs), seed)


@cache  # it takes a second, and tables and figures ask for the same ones
def _estimated(seeds: tuple[tuple[float, ...], ...], seed: int) -> Estimate:
    over_rows = mean_score([fmean(scores) for scores in zip(*seeds, strict=True)])
    if len(seeds) == 1:
        return over_rows
    draw = random.Random(seed)
    means: list[float] = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(seeds, k=len(seeds))
        means.append(fmean(_resampled(rows, draw) for rows in drawn))
    return _interval(fmean(map(fmean, seeds)), means) or over_rows


def difference(runs: Sequence[Run], others: Sequence[Run], name: str, *, seed: int = 0) -> Estimate:
    """How much more `runs` have right than `others`, with a 95 % interval.

    Both answered the same rows, so the bootstrap draws rows once for both, and seeds of each. Of
    one seed each, and where no draw differs, it is the interval over rows of `ow.evaluate`.
    """
    pairs = zip(_by_row(runs, name), _by_row(others, name), strict=True)
    over_rows = mean_difference([own - other for own, other in pairs])
    if len(runs) == len(others) == 1:
        return over_rows
    draw = random.Random(seed)
    count = len(runs[0].rows(name))
    means: list[float] = []
    for _ in range(RESAMPLES):
        first, second = (draw.choices(own, k=len(own)) for own in (runs, others))
        places = draw.choices(range(count), k=count)
        means.append(_at(first, name, places) - _at(second, name, places))
    value = fmean(run.score(name) for run in runs) - fmean(run.score(name) for run in others)
    return _interval(value, means) or over_rows


def _by_row(runs: Sequence[Run], name: str) -> list[float]:
    """Of each row the mean over the seeds."""
    return [fmean(scores) for scores in zip(*(run.rows(name) for run in runs), strict=True)]


def _resampled(scores: Sequence[float], draw: random.Random) -> float:
    return fmean(draw.choices(scores, k=len(scores)))


def _at(runs: Sequence[Run], name: str, places: Sequence[int]) -> float:
    totals = [sum(column) for column in zip(*(run.rows(name) for run in runs), strict=True)]
    return sum(totals[place] for place in places) / (len(places) * len(runs))


def _interval(value: float, means: list[float]) -> Estimate | None:
    """None where all that was drawn is the same, which would claim certainty."""
    means.sort()
    low, high = (means[round(share * (len(means) - 1))] for share in (0.025, 0.975))
    return Estimate(value, low, high) if low < high else None


# ---- what it cost --------------------------------------------------------------------------------

Span = tuple[float, float]  # from and until, in seconds


def shared_seconds(span: Span, others: Sequence[Span]) -> float:
    """The length of a span in which every moment counts by one over how many ran, itself among
    them.
    """
    begin, end = span
    ends = {begin, end, *(moment for one in others for moment in one if begin < moment < end)}
    moments = sorted(ends)
    total = 0.0
    for low, high in zip(moments, moments[1:], strict=False):
        running = 1 + sum(start <= low and stop >= high for start, stop in others)
        total += (high - low) / running
    return total
