"""What the study is to measure: methods, how much of each, and which run goes on from which."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cookbook.sdft.skills.data import SKILLS
from cookbook.sdft.skills.results import Run

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"loss": "sft"},
    "sdft_forward": {"loss": "sdft", "sdft_divergence": "forward_kl"},
    "sdft_reverse": {"loss": "sdft", "sdft_divergence": "reverse_kl"},
    "sdft_frozen": {"loss": "sdft", "sdft_divergence": "forward_kl", "sdft_ema_alpha": 0.0},
    "sdft_skip": {"loss": "sdft", "sdft_divergence": "forward_kl", "sdft_skip_tokens": 3},
    "sdft_template": {"loss": "sdft", "sdft_demo_placement": "template"},
    "grpo": {"loss": "grpo"},
    "sft_grpo": {"loss": "grpo"},
}
GOES_ON = "sft_grpo"  # from what SFT at the lowest rate has made
LONGEST_FIRST = (
    *("sdft_forward", "sdft_reverse", "sdft_frozen", "sdft_skip", "sdft_template", "grpo", "sft"),
    GOES_ON,  # after the SFT that it goes on from
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done.

    Attributes:
        rates_of: Of methods that take others than `rates`.
        later_rates: At which the skills after the first are taught; None for the best of each
            method on the first.
        step_rows: Sequences of an optimizer step.
        grpo_steps, grpo_rows: The same of GRPO, whose sequences are completions.
        gate_rows: Prompts that SDFT's student and teacher answer to see who is better.
        new_tokens: Longest answer, by skill.
        test_rows: Held-out rows of each skill.
        benchmarks: What is kept is measured by these, and by the KL to the base.
        vram_gb: What a job needs.
        memory_gb: GPU memory that a training may fill; None for all.
    """

    model: str
    skills: Sequence[str] = SKILLS
    methods: Sequence[str] = ("grpo", "sft", "sdft_forward", "sdft_reverse", "sdft_frozen")
    rates: Sequence[float] = (1e-5, 2e-5, 5e-5, 1e-4)
    rates_of: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"grpo": (5e-5,), "sft_grpo": (5e-5,)}
    )
    later_rates: Sequence[float] | None = None
    seeds: Sequence[int] = (1, 2, 3)
    steps: int = 50
    step_rows: int = 16
    grpo_steps: int = 200
    grpo_rows: int = 32
    rank: int = 32
    gate_rows: int = 16
    new_tokens: Mapping[str, int] = field(
        default_factory=lambda: {"tool_use": 96, "arithmetic": 16, "orders": 24}
    )
    test_rows: int | None = None
    benchmarks: Sequence[str] = ("humaneval",)
    easy: bool = False
    vram_gb: int | None = None
    memory_gb: float | None = None

    def is_grpo(self, method: str) -> bool:
        """Whether a method learns from rewards, which the later skills are not taught by."""
        return METHODS[method]["loss"] == "grpo"

    def rates_at(self, method: str) -> Sequence[float]:
        """At which the first skill is taught by a method."""
        return self.rates_of.get(method, self.rates)


def small(model: str) -> Scale:
    """Two skills, two methods, one seed: what two CPU cores do in 7 minutes."""
    return Scale(
        model=model,
        skills=("orders", "arithmetic"),
        methods=("sft", "sdft_forward"),
        rates=(1e-4, 3e-4),
        rates_of={"sdft_forward": (3e-4,)},  # so few steps teach it nothing at the lower one
        seeds=(1,),
        steps=24,
        step_rows=8,
        rank=16,
        gate_rows=8,
        test_rows=32,
        benchmarks=(),
        easy=True,
        vram_gb=0,
    )


def frontier(scale: Scale) -> list[Run]:
    """Base, and every method at every rate and seed, on the first skill; a seed after the other, so
    that a study that is cut short has whole ones.
    """
    runs = [Run("base", 0.0, 0, 0)]
    methods = sorted(scale.methods, key=lambda method: method == GOES_ON)
    for seed, method in itertools.product(scale.seeds, methods):
        runs += [Run(method, rate, seed, 1) for rate in scale.rates_at(method)]
    return runs


def sequence(scale: Scale, chosen: Mapping[str, float]) -> list[Run]:
    """The other skills one after another, by each method at those of the later rates that it had on
    the first; without any at the one that was chosen for it.
    """
    if scale.later_rates is None:
        rates = {method: [rate] for method, rate in chosen.items()}
    else:
        wanted = scale.later_rates
        rates = {
            method: [rate for rate in wanted if rate in scale.rates_at(method)]
            for method in scale.methods
        }
    own = [
        (method, rate)
        for method in scale.methods
        if not scale.is_grpo(method)
        for rate in rates.get(method, ())
    ]
    plan = itertools.product(scale.seeds, own, range(2, len(scale.skills) + 1))
    return [Run(method, rate, seed, stage) for seed, (method, rate), stage in plan]


def whole(scale: Scale) -> int:
    """How many runs there are in all, before any rate is chosen."""
    return len(frontier(scale)) + len(sequence(scale, dict.fromkeys(scale.methods, 0.0)))


def chains(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that go on from one another, in the order in which they are to be queued: a seed after
    the other, so that a study that is cut short has whole ones; of a seed the longest first, so
    that nothing is left to wait for alone.
    """
    order = ("base", *LONGEST_FIRST)
    found: dict[tuple[str, float, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, order.index(run.method))):
        found.setdefault((run.method, run.rate, run.seed), []).append(run)
    return list(found.values())


def start_of(run: Run, scale: Scale) -> Run | None:
    """What a run goes on from; None for the base."""
    if run.stage > 1:
        return replace(run, stage=run.stage - 1)
    return Run("sft", min(scale.rates), run.seed, 1) if run.method == GOES_ON else None
