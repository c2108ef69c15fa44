"""What SFT, SDFT and GRPO teach, and what they keep: one skill, and then skills in sequence.

    python cookbook/sdft/skills/run.py --small              SmolLM2, two skills, about 20 minutes
    python cookbook/sdft/skills/run.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct
    python cookbook/sdft/skills/run.py --draw results.json  figures and tables of what was measured

Everything runs as ordinary jobs: a grid of training jobs (methods x learning rates x seeds) on the
first skill, and for each an evaluation that waits for it (`after=[job]`). From the first seed's
every method's rate is chosen, and at it the skills are taught one after another, each stage going
on from the adapter of the one before; with `--later-rates` every method does so at those. A study
that was stopped is taken up by the same command: equal jobs have equal ids, so what is done is
done. On a large card `--at-once 8` lets so many jobs share it.

Written to `--out`, as runs end: `results.json`; and at the end `frontier.png` (the new skill
against what was kept; each rate a point, seeds as whiskers), `sequence.png` (every skill over the
stages, a line for each method) and `results.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cookbook.models import LARGE, choice, parser
from cookbook.sdft.skills.data import SKILLS, exploring, skill_rows
from cookbook.sdft.skills.results import (
    Run,
    chosen_rates,
    frontier_points,
    in_order,
    shared_seconds,
)
from openweights import OpenWeights
from openweights.client import Job
from openweights.types import ENDED

HERE = Path(__file__).parent
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
SCORE = f"{HERE / 'grading.py'}:score"
NEAR = f"{HERE / 'grading.py'}:near"
# No answer that the base draws is right, and where all rewards are equal nothing is learned.
REWARDS = {SCORE: 1.0, NEAR: 1.0, "rouge_l": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"loss": "sft"},
    "sdft_forward": {"loss": "sdft", "sdft_divergence": "forward_kl"},
    "sdft_reverse": {"loss": "sdft", "sdft_divergence": "reverse_kl"},
    "sdft_frozen": {"loss": "sdft", "sdft_divergence": "forward_kl", "sdft_ema_alpha": 0.0},
    "sdft_template": {"loss": "sdft", "sdft_demo_placement": "template"},
    "grpo": {"loss": "grpo"},
    "sft_grpo": {"loss": "grpo"},
}
GOES_ON = "sft_grpo"  # from what SFT at the lowest rate has made
START_S = 60.0  # a worker of ours registers within so long
POLL_S = 2.0


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
    rates: Sequence[float] = (3e-6, 1e-5, 3e-5, 1e-4)
    rates_of: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"grpo": (5e-5,), "sft_grpo": (5e-5,)}
    )
    later_rates: Sequence[float] | None = None
    seeds: Sequence[int] = (1, 2, 3)
    steps: int = 100
    step_rows: int = 16
    grpo_steps: int = 150
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


def small(model: str) -> Scale:
    """Two skills, two methods, one seed: what two CPU cores do in 20 minutes."""
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


# ---- what is to be measured ----------------------------------------------------------------------


def frontier(scale: Scale) -> list[Run]:
    """Base, and every method at every rate and seed, on the first skill; a seed after the other, so
    that a study that is cut short has whole ones.
    """
    runs = [Run("base", 0.0, 0, 0)]
    methods = sorted(scale.methods, key=lambda method: method == GOES_ON)
    for seed, method in itertools.product(scale.seeds, methods):
        rates = scale.rates_of.get(method, scale.rates)
        runs += [Run(method, rate, seed, 1) for rate in rates]
    return runs


def sequence(scale: Scale, chosen: Mapping[str, float]) -> list[Run]:
    """The other skills one after another, by each method at those of the later rates that it had on
    the first; without any at the one that was chosen for it.
    """
    if scale.later_rates is None:
        rates = {method: [rate] for method, rate in chosen.items()}
    else:
        wanted = [rate for rate in scale.later_rates if rate in scale.rates]
        rates = dict.fromkeys(scale.methods, wanted)
    own = [
        (method, rate)
        for method in scale.methods
        if not scale.is_grpo(method)
        for rate in rates.get(method, ())
    ]
    plan = itertools.product(scale.seeds, own, range(2, len(scale.skills) + 1))
    return [Run(method, rate, seed, stage) for seed, (method, rate), stage in plan]


def start_of(run: Run, scale: Scale) -> Run | None:
    """What a run goes on from; None for the base."""
    if run.stage > 1:
        return replace(run, stage=run.stage - 1)
    return Run("sft", min(scale.rates), run.seed, 1) if run.method == GOES_ON else None


class Study:
    """Submits the jobs, looks for those that have ended, and collects what they measured.

    Args:
        out: Folder of the results.
    """

    def __init__(self, ow: OpenWeights, scale: Scale, out: Path) -> None:
        self._ow = ow
        self._scale = scale
        self._out = out
        out.mkdir(parents=True, exist_ok=True)
        self._train_files = {skill: self._upload(skill) for skill in scale.skills}
        self._exploring_file = self._upload_exploring(scale.skills[0])
        self._test_file = self._upload_test()
        self._trained: dict[tuple[str, float, int, int], Job] = {}
        self._waiting: list[tuple[Run, Job]] = []

    def _upload(self, skill: str) -> str:
        rows = skill_rows(skill, easy=self._scale.easy).train
        return self._stored(rows, f"{skill}.jsonl")

    def _upload_exploring(self, skill: str) -> str:
        rows = exploring(skill_rows(skill, easy=self._scale.easy).train)
        return self._stored(rows, f"{skill}_exploring.jsonl")

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

    def submit(self, run: Run) -> None:
        """Train, unless it is the base, and measure afterwards."""
        if run.stage == 0:
            self._waiting.append((run, self._measure(self._scale.model)))
            return
        start = start_of(run, self._scale)
        job = self._train(run, None if start is None else self._trained[start.key])
        self._trained[run.key] = job
        self._waiting.append((replace(run, job_id=job.id), self._measure(job.id, after=job)))

    def _train(self, run: Run, start: Job | None) -> Job:
        """Teach a skill to the base, or to what `start` has made of it."""
        scale, skill = self._scale, self._scale.skills[run.stage - 1]
        given = {"model": scale.model} if start is None else {"model": start.id, "after": [start]}
        is_grpo = scale.is_grpo(run.method)
        steps = scale.grpo_steps if is_grpo else scale.steps
        about = {"method": run.method, "rate": run.rate, "seed": run.seed, "skill": skill}
        return self._ow.fine_tuning.create(
            **given,
            training_file=self._rows(run, start),
            learning_rate=run.rate,
            seed=run.seed,
            r=scale.rank,
            max_steps=steps,
            per_device_train_batch_size=scale.grpo_rows if is_grpo else scale.step_rows,
            gradient_accumulation_steps=1,
            kl_to_base_steps=steps,
            engine="transformers",  # by which later stages must be trained
            memory_budget_gb=scale.memory_gb,
            requires_vram_gb=scale.vram_gb,
            meta={"study": "skills", **about},
            **METHODS[run.method],
            **self._own_fields(run.method, skill),
        )

    def _rows(self, run: Run, start: Job | None) -> str:
        explores = start is None and self._scale.is_grpo(run.method)
        skill = self._scale.skills[run.stage - 1]
        return self._exploring_file if explores else self._train_files[skill]

    def _own_fields(self, method: str, skill: str) -> dict[str, Any]:
        tokens = self._scale.new_tokens[skill]
        match METHODS[method]["loss"]:
            case "sdft":
                return {
                    "sdft_max_new_tokens": tokens,
                    "sdft_gate_reward": SCORE,
                    "sdft_gate_rows": self._scale.gate_rows,
                }
            case "grpo":
                return {
                    "grpo_reward_function": REWARDS,
                    "grpo_max_completion_length": tokens,
                    "grpo_temperature": 1.0,
                    "beta": 0.0,
                }
            case _:
                return {}

    def _measure(self, model: str, *, after: Job | None = None) -> Job:
        """Every skill, and what is to be kept, of a model."""
        return self._ow.evaluate.create(
            models=[model],
            suite=[SCORE, *self._scale.benchmarks],
            prompts=self._test_file,
            max_tokens=None,
            requires_vram_gb=self._scale.vram_gb,
            after=[after] if after is not None else [],
        )

    # ---- what they found

    def ended(self, deadline: float) -> Iterator[Run]:
        """Runs as they end, with what was measured, or why they stopped. More may be submitted
        meanwhile. Ends with the last, or at a moment of `time.monotonic`.
        """
        while self._waiting and time.monotonic() < deadline:
            states = {job.id: job for job in self._ow.jobs.list(limit=None)}
            over = [one for one in self._waiting if states[one[1].id].status in ENDED]
            for run, job in over:
                self._waiting.remove((run, job))
                yield self._found(run, states[job.id])
            if not over:
                self._ow.ensure_worker()
                time.sleep(POLL_S)

    def _found(self, run: Run, measured: Job) -> Run:
        training = self._trained.get(run.key)
        if training is not None:
            run = replace(run, gate=gate_figures(training))
        for job in (training, measured):
            if job is not None and job.refresh().status != "completed":
                reason = job.runs[-1].record.error if job.runs else "what it waits for has failed"
                return replace(run, stopped=f"{job.status}: {reason}")
        folder = self._out / "answers" / measured.id
        measured.download(folder)
        graded = {
            name: _graded(folder / "evaluation" / f"{name}-0.jsonl")
            for name in ("score", *self._scale.benchmarks)
        }
        scores = {
            skill: [score for row, score in graded["score"] if row.startswith(skill)]
            for skill in self._scale.skills
        }
        kept = {name: [score for _, score in graded[name]] for name in self._scale.benchmarks}
        if training is not None:
            run = replace(run, kl=kl_to_base(training), cost_s=self._cost_s(training))
        return replace(run, scores=scores, kept=kept)

    def _cost_s(self, job: Job) -> float:
        """Of the steps of all its runs, without starts and loading."""
        others = [run.record for run in self._ow.runs.list(limit=None) if run.job_id != job.id]
        ends = [math.inf if run.ended_at is None else run.ended_at.timestamp() for run in others]
        spans = [(run.created_at.timestamp(), own) for run, own in zip(others, ends, strict=True)]
        moments: dict[int, list[float]] = {}
        for event in job.events():
            if "loss" in event.data:
                moments.setdefault(event.run_id, []).append(event.created_at.timestamp())
        return sum(shared_seconds((own[0], own[-1]), spans) for own in moments.values())


def _graded(path: Path) -> list[tuple[str, float]]:
    """The id and the score of every row."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(str(row["id"]), float(row["score"])) for row in rows]


def kl_to_base(job: Job) -> float:
    """The last that a training job has logged."""
    rows = [row for row in job.metrics(as_dataframe=False) if row["tag"] == "everyday"]
    return float(rows[-1]["kl_to_base"])


def gate_figures(job: Job) -> dict[str, Any]:
    """What the teacher gate of a training job found each time; nothing where it had none."""
    values = [event.data for event in job.events(type="teacher_gate")]
    if not values:
        return {}
    place = {name: values[0][name] for name in ("placement", "repeats")}
    shares = {who: [round(one[who], 3) for one in values] for who in ("student", "teacher")}
    return {**place, **shares}


@contextmanager
def workers(ow: OpenWeights, count: int, log: Path) -> Iterator[None]:
    """So many workers on this machine, until the end; of one the store takes care itself."""
    if count <= 1:
        yield
        return
    command = [sys.executable, "-m", "openweights.cli", "worker"]
    with log.open("ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        threads = max(1, (os.cpu_count() or 1) // count)
        env = {"OMP_NUM_THREADS": str(threads), **ow.settings.child_env()}
        started = [subprocess.Popen(command, env=env, **streams) for _ in range(count)]
        try:
            _await_workers(ow, count)
            yield
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def _await_workers(ow: OpenWeights, count: int) -> None:
    """Until they have registered; else the store would start one of its own beside them."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if len(ow.backend.list_workers(statuses=["active"])) >= count:
            return
        time.sleep(POLL_S / 10)


# ---- the study -----------------------------------------------------------------------------------


def carry_out(study: Study, scale: Scale, out: Path, deadline: float) -> list[Run]:
    """All runs that ended in time; `results.json` is written after each."""
    plan = frontier(scale)
    if scale.later_rates is not None:
        plan = sorted([*plan, *sequence(scale, {})], key=lambda run: run.seed)
    undecided = {run.key for run in plan if run.seed in (0, scale.seeds[0])}
    for run in plan:
        study.submit(run)
    runs: list[Run] = []
    for run in study.ended(deadline):
        runs = in_order([*runs, run])
        write(out / "results.json", scale, runs)
        print(told(run), flush=True)
        if scale.later_rates is None and undecided:
            undecided.discard(run.key)
            if not undecided:
                first = [one for one in measured(runs) if one.seed in (0, scale.seeds[0])]
                rates = chosen_rates(frontier_points(first, scale.skills[0]))
                for later in sequence(scale, rates):
                    study.submit(later)
    return measured(runs)


def measured(runs: Iterable[Run]) -> list[Run]:
    """Those that completed."""
    return [run for run in runs if not run.stopped]


def told(run: Run) -> str:
    """A run in a line."""
    if run.stopped:
        return f"{run.label}: {' '.join(filter(None, (run.job_id, run.stopped)))}"
    scores = [f"{name} {run.score(name):.2f}" for name in (*run.scores, *run.kept)]
    return f"{run.label}: {', '.join(scores)}, KL to base {run.kl:.3f}"


def write(path: Path, scale: Scale, runs: Sequence[Run]) -> None:
    """What was done, and what was measured."""
    about = {**asdict(scale), "model": Path(scale.model).name}
    lines = ",\n".join(f"  {json.dumps(run.data())}" for run in runs)
    text = f'{{"study": {json.dumps(about)},\n "runs": [\n{lines}\n]}}\n'
    path.write_text(text, encoding="utf-8")


def draw(results: Path, out: Path) -> None:
    """The figures and tables of what was measured."""
    # A machine that only trains needs no matplotlib.
    from cookbook.sdft.skills.figures import differences, draw_frontier, draw_sequence, table

    data = json.loads(results.read_text(encoding="utf-8"))
    skills, runs = data["study"]["skills"], measured(Run.of(run) for run in data["runs"])
    out.mkdir(parents=True, exist_ok=True)
    draw_frontier(frontier_points(runs, skills[0]), skills[0], out / "frontier.png")
    draw_sequence(runs, skills, out / "sequence.png")
    text = "\n".join(filter(None, (table(runs, skills), differences(runs, skills))))
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"figures and tables are in {out}")


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = parser(__doc__)
    asked.add_argument("--small", action="store_true", help="two skills, one seed, a small model")
    asked.add_argument("--methods", nargs="+", choices=list(METHODS))
    asked.add_argument("--rates", nargs="+", type=float, metavar="RATE")
    asked.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    asked.add_argument("--skills", nargs="+", choices=SKILLS, help="in the order of the sequence")
    asked.add_argument(
        "--later-rates",
        nargs="*",
        type=float,
        metavar="RATE",
        help="rates at which the later skills are taught; the best of each method on the first",
    )
    asked.add_argument("--grpo-rates", nargs="+", type=float, metavar="RATE")
    asked.add_argument("--grpo-steps", type=int, help="optimizer steps of GRPO")
    asked.add_argument("--test-rows", type=int, help="held-out rows of each skill")
    asked.add_argument("--at-once", type=int, help="jobs that share this machine")
    asked.add_argument("--memory-gb", type=float, help="GPU memory that each of them may fill")
    asked.add_argument("--minutes", type=float, default=math.inf, help="look no longer for results")
    asked.add_argument("--out", type=Path, default=Path("results") / "skills")
    asked.add_argument("--draw", type=Path, metavar="FILE", help="run nothing; draw a results.json")
    return asked.parse_args()


def scale_of(options: argparse.Namespace, ow: OpenWeights) -> Scale:
    """What the command line asks for."""
    if options.small:
        default = small(choice(ow, options).model)
    else:
        default = Scale(options.model or (LARGE if options.large else MODEL))
    names = ("steps", "methods", "rates", "later_rates", "seeds", "skills", "grpo_steps")
    names += ("test_rows", "memory_gb")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    own = {m: r for m, r in default.rates_of.items() if not options.rates or default.is_grpo(m)}
    if options.grpo_rates:
        own |= dict.fromkeys(("grpo", GOES_ON), options.grpo_rates)
    scale = replace(default, **given, rates_of=own)
    if GOES_ON in scale.methods and "sft" not in scale.methods:
        raise SystemExit(f"--methods: {GOES_ON} goes on from sft; add sft")
    return scale


def main() -> None:
    """Run the study, or take it up."""
    options = arguments()
    if options.draw is not None:
        draw(options.draw, options.out)
        return
    deadline = time.monotonic() + 60 * options.minutes
    ow = OpenWeights()
    scale = scale_of(options, ow)
    study = Study(ow, scale, options.out)
    at_once = options.at_once or (2 if options.small and not ow.settings.is_remote else 1)
    with workers(ow, at_once, options.out / "workers.log"):
        if not carry_out(study, scale, options.out, deadline):
            raise SystemExit("no run has ended")
    draw(options.out / "results.json", options.out)


if __name__ == "__main__":
    main()
