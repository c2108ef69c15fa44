"""The study's jobs: a training and an evaluation for each run, and what they found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cookbook.sdft.skills.data import exploring, skill_rows
from cookbook.sdft.skills.plan import METHODS, Scale, start_of
from cookbook.sdft.skills.results import Run, shared_seconds
from cookbook.sdft.skills.telling import Doing
from openweights import OpenWeights
from openweights.client import Job
from openweights.client.results import write_table
from openweights.client.watching.progress import read_progress
from openweights.errors import ConfigError, InvalidStateError
from openweights.types import ENDED

HERE = Path(__file__).parent
SCORE = f"{HERE / 'grading.py'}:score"
NEAR = f"{HERE / 'grading.py'}:near"
# No answer that the base draws is right, and where all rewards are equal nothing is learned. The
# overlap with the right answer is no third one: it pays for a call in another format.
REWARDS = {SCORE: 1.0, NEAR: 1.0}
POLL_S = 2.0


class Study:
    """Submits the jobs, looks for those that have ended, and collects what they measured.

    Args:
        out: Folder of the results.
    """

    def __init__(self, ow: OpenWeights, scale: Scale, out: Path) -> None:
        self._ow = ow
        self._scale = scale
        self._out = out
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
        path = write_table(rows, self._out / "data" / name)
        return str(self._ow.files.upload(path, purpose="conversations")["id"])

    # ---- jobs

    def submit(self, chain: Sequence[Run]) -> int:
        """Train runs that go on from one another, and then measure each: what others wait for is
        queued before what nobody waits for. The base is only measured.

        Returns:
            How many were measured before.
        """
        there = 0
        for run in chain:
            if run.stage:
                start = self._start(run)
                self._trained[run.key] = _queued(partial(self._train, run, start), start)
        for run in chain:
            job = self._trained.get(run.key)
            model = job.id if job else self._scale.model
            measured = _queued(partial(self._measure, model, after=job), job)
            self._waiting.append((replace(run, job_id=job.id if job else ""), measured))
            there += measured.status == "completed"
        return there

    def _start(self, run: Run) -> Job | None:
        """What has trained, or trains, the model that a run goes on from; None for the base."""
        start = start_of(run, self._scale)
        return start and self._trained[start.key]

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

    def ended(self, deadline: float, tell: Callable[[], None] = lambda: None) -> Iterator[Run]:
        """Runs as they end, with what was measured, or why they stopped. More may be submitted
        meanwhile. Ends with the last, or at a moment of `time.monotonic`.

        Args:
            tell: Called again and again while none ends.
        """
        while self._waiting and time.monotonic() < deadline:
            states = {job.id: job for job in self._ow.jobs.list(limit=None)}
            over = [one for one in self._waiting if _has_ended(states.get(one[1].id))]
            for run, job in over:
                self._waiting.remove((run, job))
                yield self._found(run, job, states)
            if not over:
                tell()
                self._ow.ensure_worker()
                time.sleep(POLL_S)

    def waiting(self) -> list[Doing]:
        """Runs that have not ended, and what a worker does for each."""
        states = {job.id: job for job in self._ow.jobs.list(limit=None)}
        return [(run, self._doing(run, job, states)) for run, job in self._waiting]

    def _doing(self, run: Run, measured: Job, states: Mapping[str, Job]) -> str:
        for word, job in (("training", self._trained.get(run.key)), ("measuring", measured)):
            now = states.get(job.id) if job is not None else None
            if now is not None and now.status == "in_progress":
                words = read_progress(self._ow.backend, now.record).words()
                return ", ".join(filter(None, (word, words)))
        return ""

    def _found(self, run: Run, measured: Job, states: Mapping[str, Job]) -> Run:
        training, start = self._trained.get(run.key), self._start(run)
        if start is not None and training is start:
            return replace(run, job_id="", stopped=f"it goes on from {start.id}, which has failed")
        if training is not None and training.id in states:
            run = replace(run, gate=gate_figures(training))
        for job in filter(None, (training, measured)):
            if stopped := why_stopped(states.get(job.id)):
                return replace(run, stopped=stopped)
        folder = self._out / "answers" / measured.id
        measured.download(folder)
        graded = {
            name: _graded(folder / "evaluation" / f"{name}.jsonl")
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


def _queued(create: Callable[[], Job], needed: Job | None) -> Job:
    """The job that `create` submits; the one that it needs, where that has ended badly: then there
    is nothing to go on from, or to measure.
    """
    try:
        return create()
    except (ConfigError, InvalidStateError):
        if needed is None or needed.refresh().status not in ("failed", "canceled"):
            raise
        return needed


def _has_ended(job: Job | None) -> bool:
    return job is None or job.status in ENDED


def why_stopped(job: Job | None) -> str:
    """Why a job that has ended gives nothing; empty for one that completed.

    Args:
        job: None for one that was deleted.
    """
    if job is None:
        return "its job was deleted"
    if job.status == "completed":
        return ""
    errors = [(job.outputs or {}).get("error"), *(run.record.error for run in job.runs[-1:])]
    return ": ".join([job.status, *filter(None, errors)][:2])


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
