"""What SFT, SDFT and GRPO teach, and what they keep: one skill, and then skills in sequence.

    python cookbook/sdft/skills/run.py --small              SmolLM2, two skills, about 20 minutes
    python cookbook/sdft/skills/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct

Everything runs as ordinary jobs: a grid of training jobs (methods x learning rates x seeds) on the
first skill, and for each an evaluation that waits for it (`after=[job]`). From these every method's
rate is chosen, and with it the skills are taught one after another, each stage going on from the
adapter of the one before. A study that was stopped is taken up by the same command: equal jobs have
equal ids, so what is done is done.

Written to `--out`: `frontier.png` (the new skill against what was kept; each rate a point, seeds as
whiskers), `sequence.png` (every skill over the stages, a line for each method), `results.md` and
`results.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cookbook.models import LARGE, choice, parser
from cookbook.sdft.skills.data import SKILLS, skill_rows
from cookbook.sdft.skills.results import (
    Run,
    chosen_rates,
    draw_frontier,
    draw_sequence,
    frontier_points,
    table,
)
from openweights import OpenWeights
from openweights.client import Job
from openweights.errors import JobFailedError

HERE = Path(__file__).parent
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
SCORE = f"{HERE / 'grading.py'}:score"
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"loss": "sft"},
    "sdft_forward": {"loss": "sdft", "sdft_divergence": "forward_kl"},
    "sdft_reverse": {"loss": "sdft", "sdft_divergence": "reverse_kl"},
    "sdft_frozen": {"loss": "sdft", "sdft_divergence": "forward_kl", "sdft_ema_alpha": 0.0},
    "grpo": {"loss": "grpo"},
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done.

    Attributes:
        step_rows: Sequences of an optimizer step, of every method.
        new_tokens: Longest answer, by skill.
        test_rows: Held-out rows of each skill.
        benchmarks: What is kept is measured by these, and by the KL to the base.
        vram_gb: What a job needs.
    """

    model: str
    skills: Sequence[str] = SKILLS
    methods: Sequence[str] = ("sft", "sdft_forward", "sdft_reverse", "sdft_frozen", "grpo")
    rates: Sequence[float] = (3e-6, 1e-5, 3e-5, 1e-4)
    seeds: Sequence[int] = (1, 2, 3)
    steps: int = 100
    step_rows: int = 16
    rank: int = 32
    new_tokens: Mapping[str, int] = field(
        default_factory=lambda: {"tool_use": 96, "arithmetic": 16, "orders": 24}
    )
    test_rows: int | None = None
    benchmarks: Sequence[str] = ("humaneval",)
    easy: bool = False
    vram_gb: int | None = None


def small(model: str) -> Scale:
    """Two skills, two methods, one seed: what two CPU cores do in 20 minutes."""
    return Scale(
        model=model,
        skills=("orders", "arithmetic"),
        methods=("sft", "sdft_forward"),
        rates=(1e-4, 3e-4),
        seeds=(1,),
        steps=24,
        step_rows=8,
        rank=16,
        test_rows=32,
        benchmarks=(),
        easy=True,
        vram_gb=0,
    )


class Study:
    """Submits the jobs, waits for them, and collects what they measured.

    Args:
        out: Folder of the results.
    """

    def __init__(self, ow: OpenWeights, scale: Scale, out: Path) -> None:
        self._ow = ow
        self._scale = scale
        self._out = out
        out.mkdir(parents=True, exist_ok=True)
        self._train_files = {skill: self._upload(skill) for skill in scale.skills}
        self._test_file = self._upload_test()

    def _upload(self, skill: str) -> str:
        rows = skill_rows(skill, easy=self._scale.easy).train
        return self._stored(rows, f"{skill}.jsonl")

    def _upload_test(self) -> str:
        rows = [
            {**row, "max_tokens": self._scale.new_tokens[skill]}
            for skill in self._scale.skills
            for row in skill_rows(skill, easy=self._scale.easy).test[: self._scale.test_rows]
        ]
        return self._stored(rows, "test.jsonl")

    def _stored(self, rows: Iterable[Mapping[str, Any]], name: str) -> str:
        path = self._out / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(self._ow.files.upload(path, purpose="conversations")["id"])

    # ---- jobs

    def train(self, method: str, rate: float, seed: int, skill: str, start: Job | None) -> Job:
        """Teach a skill to the base, or to what `start` has made of it."""
        scale = self._scale
        given = {"model": scale.model} if start is None else {"model": start.id, "after": [start]}
        return self._ow.fine_tuning.create(
            **given,
            training_file=self._train_files[skill],
            learning_rate=rate,
            seed=seed,
            r=scale.rank,
            max_steps=scale.steps,
            per_device_train_batch_size=scale.step_rows,
            gradient_accumulation_steps=1,
            kl_to_base_steps=scale.steps,
            requires_vram_gb=scale.vram_gb,
            meta={"study": "skills", "method": method, "rate": rate, "seed": seed, "skill": skill},
            **METHODS[method],
            **self._own_fields(method, skill),
        )

    def _own_fields(self, method: str, skill: str) -> dict[str, Any]:
        tokens = self._scale.new_tokens[skill]
        match METHODS[method]["loss"]:
            case "sdft":
                return {"sdft_max_new_tokens": tokens, "sdft_gate_reward": SCORE}
            case "grpo":
                return {
                    "grpo_reward_function": SCORE,
                    "grpo_max_completion_length": tokens,
                    "grpo_temperature": 1.0,
                    "beta": 0.0,
                }
            case _:
                return {}

    def measure(self, model: str, *, after: Job | None = None) -> Job:
        """Every skill, and what is to be kept, of a model."""
        return self._ow.evaluate.create(
            models=[model],
            suite=[SCORE, *self._scale.benchmarks],
            prompts=self._test_file,
            max_tokens=None,
            requires_vram_gb=self._scale.vram_gb,
            after=[after] if after is not None else [],
        )

    def finished(self, training: Job | None, measured: Job, run: Run) -> Run | None:
        """The run with what its evaluation found; None for one that failed, which is told."""
        for job in filter(None, (training, measured)):
            try:
                job.wait()
            except JobFailedError as error:
                print(f"{run.label}: {error}")
                return None
        folder = self._out / "answers" / measured.id
        measured.download(folder)
        lines = (folder / "evaluation" / "score-0.jsonl").read_text(encoding="utf-8").splitlines()
        scores = {
            skill: [row["score"] for row in map(json.loads, lines) if row["id"].startswith(skill)]
            for skill in self._scale.skills
        }
        kept = {
            event.data["task"]: event.data["score"]
            for event in measured.events(type="evaluation")
            if event.data["task"] in self._scale.benchmarks
        }
        return run.measured(scores, kept, 0.0 if training is None else kl_to_base(training))


def kl_to_base(job: Job) -> float:
    """The last that a training job has logged."""
    rows = [row for row in job.metrics(as_dataframe=False) if row["tag"] == "everyday"]
    return float(rows[-1]["kl_to_base"])


# ---- the two parts of the study ------------------------------------------------------------------


def frontier(study: Study, scale: Scale) -> list[Run]:
    """Base, and every method at every rate and seed, on the first skill."""
    skill = scale.skills[0]
    grid = list(itertools.product(scale.methods, scale.rates, scale.seeds))
    submitted: list[tuple[Job | None, Job, Run]] = [
        (None, study.measure(scale.model), Run("base", 0.0, 0, 0))
    ]
    for method, rate, seed in grid:
        job = study.train(method, rate, seed, skill, None)
        submitted.append(
            (job, study.measure(job.id, after=job), Run(method, rate, seed, 1, job.id))
        )
    return [run for one in submitted if (run := study.finished(*one)) is not None]


def sequence(study: Study, scale: Scale, first: Sequence[Run], ow: OpenWeights) -> list[Run]:
    """The skills one after another, at the rate that each method was best at."""
    submitted: list[tuple[Job | None, Job, Run]] = []
    rates = chosen_rates(frontier_points(first, scale.skills[0]))
    for run in first:
        if run.stage != 1 or run.rate != rates.get(run.method):
            continue
        start = ow.jobs.retrieve(run.job_id)
        for stage, skill in enumerate(scale.skills[1:], 2):
            start = study.train(run.method, run.rate, run.seed, skill, start)
            later = Run(run.method, run.rate, run.seed, stage, start.id)
            submitted.append((start, study.measure(start.id, after=start), later))
    return [run for one in submitted if (run := study.finished(*one)) is not None]


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = parser(__doc__)
    asked.add_argument("--small", action="store_true", help="two skills, one seed, a small model")
    asked.add_argument("--methods", nargs="+", choices=list(METHODS))
    asked.add_argument("--rates", nargs="+", type=float, metavar="RATE")
    asked.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    asked.add_argument("--skills", nargs="+", choices=SKILLS, help="in the order of the sequence")
    asked.add_argument("--test-rows", type=int, help="held-out rows of each skill")
    asked.add_argument("--out", type=Path, default=Path("results") / "skills")
    return asked.parse_args()


def scale_of(options: argparse.Namespace, ow: OpenWeights) -> Scale:
    """What the command line asks for."""
    if options.small:
        default = small(choice(ow, options).model)
    else:
        default = Scale(options.model or (LARGE if options.large else MODEL))
    names = ("steps", "methods", "rates", "seeds", "skills", "test_rows")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(default, **given)


def main() -> None:
    """Run the study, or take it up."""
    options = arguments()
    ow = OpenWeights()
    scale = scale_of(options, ow)
    study = Study(ow, scale, options.out)
    first = frontier(study, scale)
    points = frontier_points(first, scale.skills[0])
    draw_frontier(points, scale.skills[0], options.out / "frontier.png")
    runs = [*first, *sequence(study, scale, first, ow)] if len(scale.skills) > 1 else first
    draw_sequence(runs, scale.skills, options.out / "sequence.png")
    text = table(runs, scale.skills)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    results = json.dumps([run.data() for run in runs], indent=1)
    (options.out / "results.json").write_text(results + "\n", encoding="utf-8")
    print(text)
    print(f"figures, tables and answers are in {options.out}")


if __name__ == "__main__":
    main()
