"""The study that `ow demo` runs: one model, one skill, the same rows; SFT and SDFT side by side.

It trains and evaluates through the ordinary client calls. A study that was interrupted goes on
where it was, and one that is done is read again: jobs with the same parameters have the same ids.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openweights.cli.demo.evaluation import (
    Answer,
    Score,
    gate_shares,
    last_kl,
    read_answers,
    score,
)
from openweights.client.local_worker import workers_beside
from openweights.errors import ConfigurationError, PlatformError
from openweights.events import TeacherGate
from openweights.models.names import name_of_folder
from openweights.needs import has_gpu

if TYPE_CHECKING:
    from openweights.client import OpenWeights
    from openweights.client.jobs import Job
    from openweights.types import EventRecord

Say = Callable[[str], None]

EXACT = f"{Path(__file__).with_name('exact.py')}:exact"
SAMPLES = 3  # answers that are shown of each method
DATA = Path(__file__).resolve().parents[3] / "cookbook" / "sdft" / "data"
AT_ONCE = 2  # jobs, on a CPU: two of one thread each do in 7 s what one of two threads does in 10
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "gguf", "matplotlib")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train.

    Attributes:
        key: Names it in files and colours.
        label: Names it for people.
        params: What `fine_tuning.create` gets besides what all methods share.
    """

    key: str
    label: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done.

    Attributes:
        steps: Optimizer steps of each method.
        batch_rows: Rows of a step.
        max_new_tokens: Longest completion of the student, and of an answer to a held-out order.
        gate_rows, test_rows: Rows that are measured on.
        gate: What SDFT jobs do when their teacher gate finds nothing to teach.
    """

    steps: int = 32
    batch_rows: int = 8
    learning_rate: float = 3e-4
    max_new_tokens: int = 16
    gate_rows: int = 16
    test_rows: int = 64
    gate: Literal["stop", "warn"] = "stop"


QUICK = Plan(steps=2, batch_rows=2, gate_rows=2, test_rows=2, gate="warn")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method led to.

    Attributes:
        kl: KL(base || model) on everyday prompts, nats per token.
        seconds: Of the job's last run, from its claim to its end.
        answers: To the held-out orders.
        metrics: Rows of `job.metrics()`.
    """

    method: Method
    kl: float
    seconds: float
    answers: list[Answer]
    metrics: list[dict[str, Any]]

    @property
    def score(self) -> Score:
        """On the held-out orders."""
        return score(self.answers)


@dataclass(slots=True)
class Study:
    """All that was measured.

    Attributes:
        model: Name of the base model.
        rows: Rows of the training file.
        gate: Share of training orders that the base model answers right, without and with the
            demonstration.
        base: Its answers to the held-out orders.
    """

    model: str
    plan: Plan
    rows: int
    gate: tuple[float, float]
    base: list[Answer]
    outcomes: list[Outcome] = field(default_factory=list[Outcome])


def methods(plan: Plan) -> list[Method]:
    """The methods that are compared."""
    distillation = {
        "loss": "sdft",
        "sdft_max_new_tokens": plan.max_new_tokens,
        "sdft_gate": plan.gate,
        "sdft_gate_rows": plan.gate_rows,
    }
    return [
        # SDFT measures its distance to the base unasked.
        Method("sft", "SFT", {"loss": "sft", "kl_to_base_steps": plan.steps}),
        Method(
            "reverse_kl",
            "SDFT, reverse KL",
            {**distillation, "sdft_divergence": "reverse_kl"},
        ),
        Method(
            "forward_kl",
            "SDFT, forward KL",
            {**distillation, "sdft_divergence": "forward_kl"},
        ),
    ]


def check_installation(data: Path = DATA) -> None:
    """See that everything is here before anything is downloaded or trained.

    Raises:
        ConfigurationError: A package or the data is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the demo needs {', '.join(missing)}: pip install 'openweights[demo]'"
        )
    if not (data / "train.jsonl").is_file():
        raise ConfigurationError(
            f"there is no {data / 'train.jsonl'}: run the demo from a clone of the repository, or "
            "name its cookbook/sdft/data with --data"
        )


def submit(
    ow: OpenWeights, method: Method, plan: Plan, *, model: Path, data: Path, suffix: str | None
) -> Job:
    """Submit the job of a method, or find it if it is there; README's example is one of them."""
    training_file = ow.files.upload(data / "train.jsonl", purpose="conversations")["id"]
    return ow.fine_tuning.create(
        model=name_of_folder(model),
        training_file=training_file,
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_rows,
        gradient_accumulation_steps=1,
        learning_rate=plan.learning_rate,
        push_to_hub=False,
        job_id_suffix=suffix,
        requires_vram_gb=0,
        **method.params,
    )


class Demo:
    """Runs a study, and says in plain lines what happens.

    Args:
        ow: Where the jobs go.
        model: Folder of the model, on this machine.
        say: Told each line.
        follow: Told each event of a job while it trains.
        data: Folder with `train.jsonl` and `test.jsonl`.
        suffix: Makes the job ids, and thereby the jobs, new ones.
    """

    def __init__(
        self,
        ow: OpenWeights,
        model: Path,
        plan: Plan,
        *,
        say: Say,
        follow: Callable[[Plan, EventRecord], None] | None = None,
        data: Path = DATA,
        suffix: str | None = None,
    ) -> None:
        self.ow = ow
        self.plan = plan
        self.model = model
        self._say = say
        self._follow = follow
        self._data = data
        self._suffix = suffix

    def run(self) -> Study:
        """Train with each method, and measure the base and what came out.

        Raises:
            JobFailedError: A job failed; the message holds the end of its log.
        """
        # With a GPU the one worker that starts by itself has it.
        at_once = 1 if has_gpu(self.ow.settings.child_env()) else AT_ONCE
        with workers_beside(self.ow.settings, self.ow.backend, at_once):
            return self._run()

    def _run(self) -> Study:
        # All before anything is waited for, in the order in which it is told of.
        orders = self._stored_orders()
        base = self._evaluate(name_of_folder(self.model), orders)
        trained = map(self._train, methods(self.plan))
        jobs = [(method, job, self._evaluate(job.id, orders)) for method, job in trained]
        self._await("The base model", base, f"{self.plan.test_rows} held-out orders")
        answers = self._answers(base)
        self._say(f"  {_scored(score(answers))}")
        outcomes: list[Outcome] = []
        for method, job, measured in jobs:
            self._await(method.label, job, f"{self.plan.steps} steps")
            self._tell_gate(job)
            self._await(f"{method.label}, measured", measured, f"{self.plan.test_rows} orders")
            outcomes.append(self._outcome(method, job, measured))
            self._show(answers, outcomes[-1])
        rows = (self._data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        return Study(
            model=self.model.name,
            plan=self.plan,
            rows=len(rows),
            gate=gate_shares(jobs[-1][1].events(type=TeacherGate.type)[0].data),
            base=answers,
            outcomes=outcomes,
        )

    def _train(self, method: Method) -> tuple[Method, Job]:
        return method, submit(
            self.ow,
            method,
            self.plan,
            model=self.model,
            data=self._data,
            suffix=self._suffix,
        )

    def _stored_orders(self) -> str:
        """The id of the file of the held-out orders."""
        lines = (self._data / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[: self.plan.test_rows]]
        return str(self.ow.files.create(rows, "conversations", name="test.jsonl")["id"])

    def _evaluate(self, model: str, orders: str) -> Job:
        """Ask the base, or what a job is to make of it, for the held-out orders."""
        return self.ow.evaluate.create(
            models=[model],
            suite=[EXACT],
            prompts=orders,
            max_tokens=self.plan.max_new_tokens,
            requires_vram_gb=0,
            job_id_suffix=self._suffix,
        )

    def _await(self, label: str, job: Job, what: str) -> None:
        if job.status == "completed":
            self._say(f"\n{label}: job {job.id} has completed before; using its result")
            return
        self._say(f"\n{label}: job {job.id}, {what}")
        follow = self._follow
        job.wait(on_event=None if follow is None else (lambda event: follow(self.plan, event)))

    def _tell_gate(self, job: Job) -> None:
        """Of SDFT, whether the demonstration in its conversation helps the base model."""
        if events := job.events(type=TeacherGate.type):
            without, shown = gate_shares(events[0].data)
            self._say(f"  teacher gate: correct {without:.2f}, shown the demonstration {shown:.2f}")

    def _answers(self, job: Job) -> list[Answer]:
        return read_answers(self._results(job) / "evaluation" / "exact.jsonl")

    def _results(self, job: Job) -> Path:
        folder = self.ow.settings.home / "demo" / job.id
        job.download(folder)
        return folder

    def _outcome(self, method: Method, job: Job, measured: Job) -> Outcome:
        folder = self._results(job)
        if not (folder / "adapter" / "adapter_config.json").is_file():
            raise PlatformError(f"job {job.id} has completed without an adapter in {folder}")
        metrics = job.metric_rows()
        return Outcome(
            method=method,
            kl=last_kl(metrics),
            seconds=_run_seconds(job),
            answers=self._answers(measured),
            metrics=metrics,
        )

    def _show(self, base: Sequence[Answer], outcome: Outcome) -> None:
        for before, after in list(zip(base, outcome.answers, strict=True))[:SAMPLES]:
            self._say(f"  order   {before.order}")
            self._say(f"  before  {_one_line(before.said)}")
            self._say(f"  after   {_one_line(after.said)}")
        self._say(
            f"  {_scored(outcome.score)}  KL, everyday {outcome.kl:.3f}  {outcome.seconds:.0f} s"
        )


def _scored(found: Score) -> str:
    return f"ledger line {found.format:.2f}  correct {found.correct:.2f}"


def _one_line(answer: str) -> str:
    """A model may say anything, also what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(answer.split()))


def _run_seconds(job: Job) -> float:
    run = job.runs[-1]
    return (run.ended_at - run.created_at).total_seconds() if run.ended_at else 0.0
