"""The study that `ow demo` runs: one model, one skill, the same rows; SFT and SDFT side by side.

It trains through the ordinary client calls, and measures the adapters that the jobs leave behind.
A study that was interrupted goes on where it was: jobs with the same parameters have the same ids.
"""

# pyright: basic
from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openweights.errors import ConfigurationError, PlatformError
from openweights.models.names import name_of_folder

if TYPE_CHECKING:
    from openweights.cli.demo.evaluation import BaseAnswer, ChatModel, Question, Score
    from openweights.client import OpenWeights
    from openweights.client.jobs import Job
    from openweights.types import EventRecord

Say = Callable[[str], None]

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
        gate_rows, test_rows, general_rows: Rows that are measured on.
        general_tokens: Longest answer to a general prompt.
        gate: What SDFT jobs do when their teacher gate finds nothing to teach.
    """

    steps: int = 32
    batch_rows: int = 8
    learning_rate: float = 3e-4
    max_new_tokens: int = 16
    gate_rows: int = 32
    test_rows: int = 64
    general_rows: int = 12
    general_tokens: int = 48
    gate: Literal["stop", "warn"] = "stop"


QUICK = Plan(
    steps=2,
    batch_rows=2,
    gate_rows=2,
    test_rows=2,
    general_rows=2,
    general_tokens=4,
    gate="warn",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method led to.

    Attributes:
        score: On the held-out orders.
        kl: KL(base || model) on the general prompts, nats per token.
        seconds: Of the job's last run, from its claim to its end.
        answers: To the first held-out orders.
        metrics: Rows of `job.metrics()`.
    """

    method: Method
    job_id: str
    score: Score
    kl: float
    seconds: float
    answers: list[str]
    metrics: list[dict[str, Any]]


@dataclass(slots=True)
class Study:
    """All that was measured.

    Attributes:
        model: Name of the base model.
        rows: Rows of the training file.
        gate: Score of the base model on training orders, without and with the demonstration.
        base: Score of the base model on the held-out orders.
    """

    model: str
    plan: Plan
    rows: int
    gate: tuple[Score, Score]
    base: Score
    samples: list[Question]
    base_answers: list[str]
    outcomes: list[Outcome] = field(default_factory=list[Outcome])


def methods(plan: Plan) -> list[Method]:
    """The methods that are compared."""
    distillation = {
        "loss": "sdft",
        "sdft_max_new_tokens": plan.max_new_tokens,
        "sdft_gate": plan.gate,
    }
    return [
        Method("sft", "SFT", {"loss": "sft"}),
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
        data: Folder with `train.jsonl`, `test.jsonl` and `general.jsonl`.
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
        """Measure the base model, train with each method, and measure what came out.

        Raises:
            JobFailedError: A job failed; the message holds the end of its log.
        """
        import torch

        from openweights.client.local_worker import own_threads, workers_beside

        _quieten_libraries()
        if torch.cuda.is_available():
            return self._run()
        # The jobs have the other cores.
        torch.set_num_threads(min(torch.get_num_threads(), own_threads(AT_ONCE)))
        with workers_beside(self.ow.settings, self.ow.backend, AT_ONCE):
            return self._run()

    def _run(self) -> Study:
        from openweights.cli.demo.evaluation import ChatModel, read_prompts, read_questions

        # All at first, so that they train while the base is measured.
        jobs = [(method, self._submit(method)) for method in methods(self.plan)]
        chat = ChatModel(self.model)
        tests = read_questions(self._data / "test.jsonl", self.plan.test_rows)
        self._say(f"The base model answers {self.plan.general_rows} general prompts …")
        general = chat.base_answers(
            read_prompts(self._data / "general.jsonl", self.plan.general_rows),
            self.plan.general_tokens,
        )
        study = self._measure_base(chat, tests)
        for method, job in jobs:
            self._await(method, job)
            outcome = self._measure(method, job, chat, tests, general)
            self._show(study, outcome)
            study.outcomes.append(outcome)
        return study

    def _measure_base(self, chat: ChatModel, tests: Sequence[Question]) -> Study:
        from openweights.cli.demo.evaluation import read_questions, score, teacher_gate

        plan = self.plan
        self._say("Teacher gate: does the demonstration in its conversation help the base model?")
        train = read_questions(self._data / "train.jsonl")
        sample = train[: plan.gate_rows]
        gate = teacher_gate(chat, sample, max_new_tokens=plan.max_new_tokens, say=self._say)
        self._say(f"Measuring the base model: answering {len(tests)} test orders …")
        answers = chat.answers([test.prompt for test in tests], plan.max_new_tokens)
        return Study(
            model=self.model.name,
            plan=plan,
            rows=len(train),
            gate=gate,
            base=score(answers, tests),
            samples=list(tests[:3]),
            base_answers=answers[:3],
        )

    def _submit(self, method: Method) -> Job:
        return submit(
            self.ow,
            method,
            self.plan,
            model=self.model,
            data=self._data,
            suffix=self._suffix,
        )

    def _await(self, method: Method, job: Job) -> None:
        if job.status == "completed":
            self._say(f"\n{method.label}: job {job.id} has completed before; using its result")
            return
        self._say(f"\n{method.label}: job {job.id}, {self.plan.steps} steps")
        follow = self._follow
        job.wait(on_event=None if follow is None else (lambda event: follow(self.plan, event)))

    def _measure(
        self,
        method: Method,
        job: Job,
        chat: ChatModel,
        tests: Sequence[Question],
        general: Sequence[BaseAnswer],
    ) -> Outcome:
        from openweights.cli.demo.evaluation import score

        folder = self.ow.settings.home / "demo" / job.id
        job.download(folder)
        if not (folder / "adapter" / "adapter_config.json").is_file():
            raise PlatformError(f"job {job.id} has completed without an adapter in {folder}")
        self._say(f"Measuring it: {len(tests)} test orders, {len(general)} everyday answers …")
        with chat.adapted(folder / "adapter"):
            answers = chat.answers([test.prompt for test in tests], self.plan.max_new_tokens)
            kl = chat.kl_from_base(general)
        return Outcome(
            method=method,
            job_id=job.id,
            score=score(answers, tests),
            kl=kl,
            seconds=_run_seconds(job),
            answers=answers[:3],
            metrics=job.metrics(as_dataframe=False),
        )

    def _show(self, study: Study, outcome: Outcome) -> None:
        rows = zip(study.samples, study.base_answers, outcome.answers, strict=True)
        for question, before, after in rows:
            self._say(f"  order   {question.prompt[-1]['content']}")
            self._say(f"  before  {_one_line(before)}")
            self._say(f"  after   {_one_line(after)}")
        found = outcome.score
        self._say(
            f"  ledger line {found.format:.2f}  correct {found.correct:.2f}  "
            f"KL, general {outcome.kl:.3f}  {outcome.seconds:.0f} s"
        )


def _one_line(answer: str) -> str:
    """A model may say anything, also what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(answer.split()))


def _run_seconds(job: Job) -> float:
    run = job.runs[-1]
    return (run.ended_at - run.created_at).total_seconds() if run.ended_at else 0.0


def _quieten_libraries() -> None:
    """No progress bars and advice between our lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
