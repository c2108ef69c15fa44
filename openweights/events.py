"""Every kind of event of a run: its fields, who writes it, and who reads it.

An event is free JSON, and a job's own code may log what it likes. What this package itself logs is
of one of these kinds; all but the first two carry a `type`, which is spelled nowhere else.

===================  ===================================  ==========================================
kind                 written by                           read by
===================  ===================================  ==========================================
metrics (no type)    trainers, at every logged step       `metric_rows`: `job.metrics`, plots
results (no type)    the worker, for files in `uploads/`  `job.download`, `ow show`, later jobs
`Stage`              jobs, before and after their steps   progress of `job.wait`
`Started`            trainers and inference, first        progress of `job.wait`
`Reproducibility`    training and scoring jobs, first     people: `ow events JOB --type …`
`HubCommit`          jobs, when they fetch a model        the next attempt, which loads the same
`IdleGPU`            workers in pods, as a warning        people
`Checkpoint`         trainers                             the next attempt; the worker, which
                                                          deletes them after completion
`Part`               inference, as rows are completed     the next attempt; the worker, as above
`Batch`              inference through OpenAI             the next attempt
`Served`             servers of deployed models, once up  `TemporaryApi`, `ow.chat`
`AdapterMoved`       trainers, at the end                 people, `job.outputs`
`Summary`            trainers, at the end                 people
`Pushed`             training jobs                        people, `job.outputs`
`TeacherGate`        SDFT, before step 0 and on the way   people, studies, plots
`Agreement`          SDFT, every some steps               plots
`Completions`        SDFT and GRPO, every some steps      people
`Samples`            sampling callbacks                   people, `job.download`
`LogProbs`           log-probability tracking and jobs    people, `job.download`
`BlockwiseLogProbs`  the same, for messages with blocks   people, `job.download`
`BlockLogProbs`      the same, for each tagged block      people
`MultipleChoice`     multiple-choice tracking and jobs    people, `job.download`
`Evaluation`         evaluations, one a model and task    `ow eval`, people
`Inspected`          evaluations of inspect-ai            people, `job.outputs`
===================  ===================================  ==========================================

Metrics are `{step, tag?, <name>: number, …}`, results `{path, file}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, cast


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedEvent:
    """An event of a kind.

    Attributes:
        type: What `data["type"]` is.
        step: Of the training, where there is one.
    """

    type: ClassVar[str]

    step: int | None = None

    def data(self) -> dict[str, Any]:
        """What is logged. Fields that are None are left out; those of `values` stand beside the
        others.
        """
        data: dict[str, Any] = {"type": self.type}
        for name in self._names():
            value = getattr(self, name)
            if name == "values":
                data |= cast("Mapping[str, Any]", value)
            elif value is not None:
                data[name] = value
        return data

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The event that was logged as `data`."""
        names = cls._names()
        given = {name: data[name] for name in names if name in data}
        if "values" in names:
            rest = data.keys() - given.keys() - {"type"}
            given["values"] = {name: data[name] for name in data if name in rest}
        return cls(**given)

    @classmethod
    def _names(cls) -> list[str]:
        return [one.name for one in fields(cls)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(TypedEvent):
    """What a job does now, until it says something else or makes a step.

    Attributes:
        doing: As in "loading the model".
        step: Behind which step that trains it does so; None before the first.
        part: How much of that is done, as in "12/48 answers"; None where that is not counted.
    """

    type: ClassVar[str] = "stage"

    doing: str
    step: int | None = None
    part: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(TypedEvent):
    """The work begins, from the start or from a checkpoint.

    Attributes:
        max_steps: At which step it ends.
        from_step: 0, or that of the checkpoint.
        unit: What a step is, such as "row"; None for a step of training.
    """

    type: ClassVar[str] = "started"

    max_steps: int
    from_step: int
    unit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleGPU(TypedEvent):
    """The GPUs of the job's pod do next to nothing; if that goes on, the job is ended.

    Attributes:
        message: For people.
        left_s: Until then.
    """

    type: ClassVar[str] = "idle_gpu"

    message: str
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproducibility(TypedEvent):
    """What it would take to do the same again.

    Attributes:
        record: Versions, machine, configuration, hashes of the data.
    """

    type: ClassVar[str] = "reproducibility"

    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCommit(TypedEvent):
    """What a repository of the Hugging Face hub was at when the job first asked for it.

    Attributes:
        repository: Its id.
        commit: 40 hexadecimal digits.
    """

    type: ClassVar[str] = "hub_commit"

    repository: str
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(TypedEvent):
    """From here the next attempt goes on.

    Attributes:
        file: Where it is in the store.
        path: Its folder, for a run from a config file.
        kept: It stays after completion (`keep_checkpoints`), for other jobs to go on from.
    """

    type: ClassVar[str] = "checkpoint"

    step: int  # type: ignore[assignment] - a checkpoint has one
    file: str | None = None
    path: str | None = None
    kept: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMoved(TypedEvent):
    """How far training has moved the adapter, at its end.

    Attributes:
        weight_difference_norm: Euclidean distance of the trained weights from where they started.
        weight_norm: Their own Euclidean norm at the start.
    """

    type: ClassVar[str] = "adapter_moved"

    weight_difference_norm: float
    weight_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(TypedEvent):
    """Rows that are completed; the next attempt does the others.

    Attributes:
        step: How many rows are completed, with those of earlier parts.
        part: File with the rows of this part.
    """

    type: ClassVar[str] = "part"

    step: int  # type: ignore[assignment] - as of a checkpoint
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(TypedEvent):
    """Rows went to OpenAI's batch API.

    Attributes:
        batch: Its id there.
    """

    type: ClassVar[str] = "batch"

    batch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(TypedEvent):
    """A deployed model can be asked.

    Attributes:
        base_url: Where, as OpenAI's clients take it: `http…/v1`.
        models: Names that requests may give.
        pod_id: The pod that serves it; None on this machine.
    """

    type: ClassVar[str] = "served"

    base_url: str
    models: Sequence[str]
    pod_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(TypedEvent):
    """What the trainer says at its end.

    Attributes:
        values: Its figures: `train_runtime` (s), `train_loss`, …
    """

    type: ClassVar[str] = "summary"

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed(TypedEvent):
    """The result went to the Hugging Face hub, or did not.

    Attributes:
        pushed_to: The repository.
        push_error: Why it is not there.
    """

    type: ClassVar[str] = "push"

    pushed_to: str | None = None
    push_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherGate(TypedEvent):
    """How much the demonstrations help the teacher of SDFT.

    Attributes:
        rows: How many prompts were answered.
        values: Figures of the student and of each teacher, such as `student_exact`,
            `template_rouge_l`, `turns_format` (the share of answers with the right one's
            format) and, where a reward is given, `turns_2_reward`; `measure`, by which `placement`
            and `repeats` were chosen, and of it `student` and `teacher`; `same_format`, the share
            of the student's answers that begin and end as the teacher's; `repeated`, the share of
            the teacher's that are the demonstration, in the place where most are; `margin`,
            `passed`, and `examples` with all answers.
    """

    type: ClassVar[str] = "teacher_gate"

    rows: int
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement(TypedEvent):
    """How often student and teacher of SDFT find the same token likeliest, along the completion.

    Attributes:
        values: Share by the place in the completion, from 0, in ranges that double: `0`, `1`,
            `2-3`, `4-7`, …
    """

    type: ClassVar[str] = "agreement"

    values: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions(TypedEvent):
    """What the model that is trained said to some of a step's prompts. The step is the one that
    learns from them, whose metrics tell of them.

    Attributes:
        completions: Of each `messages`, what was asked, with `prompt`, its text; `completion`, and
            what the loss made of it: `ended` of SDFT, `rewards` of GRPO.
        scales: Of each reward, what its values say.
        tag, samples: The type, and the completions, under their older names.
    """

    type: ClassVar[str] = "completions"

    completions: Sequence[Mapping[str, Any]]
    scales: Mapping[str, str] | None = None
    tag: str | None = "completions"
    samples: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples(TypedEvent):
    """Answers to a set of prompts; they are rows of the event's file.

    Attributes:
        tag: Of the set.
    """

    type: ClassVar[str] = "samples"

    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs(TypedEvent):
    """Log-probabilities of a set of conversations; they are rows of the event's file.

    Attributes:
        tag: The set's name, when it is followed while a model trains.
        values: The mean loss: by the set's name, or as `loss` of a job of its own.
    """

    type: ClassVar[str] = "logprobs"

    tag: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockwiseLogProbs(LogProbs):
    """The same, where messages have blocks."""

    type: ClassVar[str] = "logprobs_blockwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLogProbs(TypedEvent):
    """Log-probabilities of one block with a tag.

    Attributes:
        source: Name of the set, or file id of a job's dataset.
        row: Of the set, from 0; so are `message` in the row and `block` in the message.
        logprobs: Of each token.
    """

    type: ClassVar[str] = "logprob_block"

    source: str
    row: int
    message: int
    block: int
    tag: str
    text: str
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice(TypedEvent):
    """Answers to a set of questions; they are rows of the event's file.

    Attributes:
        tag: Of the set, when it is followed while a model trains.
        accuracy: Share of questions whose right choice was likeliest.
        probability: Mean of the right choices'.
        questions: How many.
    """

    type: ClassVar[str] = "multiple_choice"

    tag: str | None = None
    accuracy: float
    probability: float
    questions: int


MMLU_PRO = "mmlu_pro"  # the task of all its subjects, each of which is a task, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(TypedEvent):
    """What a model has scored in one evaluation.

    Attributes:
        model: As it was named; a job that had not completed with its checkpoint.
        task: `humaneval`, or what else the suite names.
        score: Mean over the problems, from 0 to 1; `low` and `high` end its 95 % interval.
        problems: How many there were.
        unscored: So many more could not be scored; None for none.
        difference: To the first model's score on the same problems, and the ends of its 95 %
            interval, which has a width however few the problems are.
    """

    type: ClassVar[str] = "evaluation"

    model: str
    task: str
    score: float
    low: float
    high: float
    problems: int
    unscored: int | None = None
    difference: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected(TypedEvent):
    """What inspect-ai has scored.

    Attributes:
        task: Its name of the evaluation.
        scorer: What has scored; of several one event each.
        samples: How many were completed.
        values: Its metrics by name: `accuracy`, `stderr`, …
    """

    type: ClassVar[str] = "inspect"

    task: str
    scorer: str
    samples: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
