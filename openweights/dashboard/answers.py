"""What an evaluation, an inference, or questions with choices were answered: a sheet for each set
of problems, with the problems down and models, or steps of a training, across.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, Literal, cast, get_args

from openweights.backends.base import Backend
from openweights.client.results import result_files
from openweights.dashboard.samples import asked, objects, step_of
from openweights.errors import InvalidInputError, NotFoundError
from openweights.events import MultipleChoice
from openweights.jobs.evaluate import BENCHMARKS
from openweights.types import JobRecord

# So many rows of a file are read; a larger one is looked at with other tools.
_MOST_READ = 20_000
# All models in a file; earlier versions wrote one for each of them, `gsm8k-0.jsonl`.
_OF_EVALUATION = re.compile(r"(?:.*/)?evaluation/(.+?)(?:-(\d+))?\.jsonl")
_OF_INFERENCE = "completions.jsonl"

Only = Literal["all", "scores", "wrong", "texts"]
_ONLY: tuple[Only, ...] = get_args(Only)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, with its score where it has one."""

    text: str
    score: float | None = None
    note: str | None = None


@dataclass(slots=True)
class Problem:
    """What was asked, and of each column what was answered: several where several were drawn."""

    messages: list[dict[str, str]]
    reference: str | None
    answers: dict[str, list[Answer]] = field(default_factory=dict[str, list[Answer]])

    def score(self, column: str) -> float | None:
        """The mean of the answers' scores, as far as there are any."""
        given = (answer.score for answer in self.answers.get(column, ()))
        known = [score for score in given if score is not None]
        return fmean(known) if known else None

    def is_shown(self, only: Only, columns: Sequence[str]) -> bool:
        """Whether the filter lets it through."""
        scores = [self.score(column) for column in columns]
        match only:
            case "all":
                return True
            case "wrong":
                return any(score is not None and score < 1 for score in scores)
            case "scores":
                return len(set(scores)) > 1
            case "texts":
                texts = (self.answers.get(column, ()) for column in columns)
                return len({tuple(answer.text for answer in own) for own in texts}) > 1


@dataclass(slots=True)
class _Sheet:
    """The files of a set of problems, each with its column.

    Attributes:
        files: `(column, file)`; what a row itself says of its model goes before the column.
        samples: Rows of a file that answer the same problem, one behind the other.
        is_checked: Whether a score says that an answer is right, or wrong: what a function of one's
            own, or a likeness to another text, calls 1 need not be.
    """

    files: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    samples: int = 1
    is_checked: bool = True


def sheet_names(backend: Backend, job: JobRecord) -> list[str]:
    """Of the sets of problems whose answers the job has left behind, as the job was asked them."""
    return [*_sheets(backend, job)]


def sheet(
    backend: Backend, job: JobRecord, name: str, only: str = "all", offset: int = 0, limit: int = 20
) -> dict[str, Any]:
    """Some problems with their answers: `{columns, counts, rows, marks}`.

    `columns` are `{name, score, problems}`, the mean over its problems that have a score; `counts`
    say how many problems each filter lets through; `marks` is whether the scores say which answers
    are right, and which are wrong: 1 and 0. `rows` are `{line, messages, reference, answers}`,
    `answers` a list of `{text, score, note}` for each column.

    Args:
        only: "all", "scores" that differ between the columns, "wrong" in one of them at least, or
            "texts" that differ.

    Raises:
        InvalidInputError: There is no such filter.
        NotFoundError: The job has no such sheet.
    """
    if only not in _ONLY:
        raise InvalidInputError(f"only: {only!r} is none of {', '.join(_ONLY)}")
    found = _sheets(backend, job).get(name)
    if found is None:
        raise NotFoundError(f"job {job.id} has no answers called {name}")
    problems = _problems(backend, found)
    columns = [*dict.fromkeys(column for problem in problems for column in problem.answers)]
    numbered = [*enumerate(problems, start=1)]
    shown = [(line, one) for line, one in numbered if one.is_shown(only, columns)]
    scores = [one.score for problem in problems for own in problem.answers.values() for one in own]
    return {
        "columns": [_column(column, problems) for column in columns],
        "counts": {
            each: sum(problem.is_shown(each, columns) for problem in problems) for each in _ONLY
        },
        "marks": found.is_checked and all(score in (0, 1, None) for score in scores),
        "rows": [_row(line, one, columns) for line, one in shown[offset : offset + limit]],
    }


def _column(name: str, problems: Sequence[Problem]) -> dict[str, Any]:
    scores = [score for one in problems if (score := one.score(name)) is not None]
    return {"name": name, "score": fmean(scores) if scores else None, "problems": len(scores)}


def _row(line: int, problem: Problem, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "line": line,
        "messages": problem.messages,
        "reference": problem.reference,
        "answers": [
            [
                {"text": one.text, "score": one.score, "note": one.note}
                for one in problem.answers.get(column, ())
            ]
            for column in columns
        ],
    }


# ---- the files of a job --------------------------------------------------------------------------


def _sheets(backend: Backend, job: JobRecord) -> dict[str, _Sheet]:
    found = _of_questions(backend, job)
    # What trains logs by step, and its events are many.
    return found if job.type == "fine-tuning" else found | _of_results(backend, job)


def _of_questions(backend: Backend, job: JobRecord) -> dict[str, _Sheet]:
    """Questions with choices, put once or every some steps of a training."""
    found: dict[str, dict[str, str]] = {}
    for event in backend.list_events(job_id=job.id, type=MultipleChoice.type):
        data = event.data
        if isinstance(file := data.get("file"), str):
            column = f"step {step_of(event)}" if "step" in data else job.model or "answers"
            found.setdefault(str(data.get("tag") or "multiple choice"), {})[column] = file
    return {name: _Sheet([*files.items()]) for name, files in found.items()}


def _of_results(backend: Backend, job: JobRecord) -> dict[str, _Sheet]:
    """What the last run of an evaluation, or of an inference, has written."""
    runs = backend.list_runs(job_id=job.id, limit=1)
    files = result_files(backend.list_events(run_id=runs[-1].id)) if runs else []
    params = job.validated_params
    samples, suite = params.get("samples"), asked_suite(job)
    found: dict[str, _Sheet] = {}
    placed: list[tuple[int, str, str]] = []
    for one in files:
        if of_task := _OF_EVALUATION.fullmatch(one["path"]):
            placed.append((int(of_task[2] or 0), of_task[1], one["file"]))
        elif one["path"] == _OF_INFERENCE:
            found["completions"] = _Sheet([(job.model or "answers", one["file"])])
    order = {task: place for place, task in enumerate(suite)}
    placed.sort(key=lambda one: (order.get(one[1], len(order)), one))
    for place, task, file in placed:
        is_checked = suite.get(task, True)
        sheet_ = _Sheet(samples=samples if isinstance(samples, int) else 1, is_checked=is_checked)
        found.setdefault(task, sheet_).files.append((f"model {place + 1}", file))
    return found


def asked_suite(job: JobRecord) -> dict[str, bool]:
    """The evaluations that the job was asked, in order, and of each whether it checks answers to be
    right, rather than to score them.
    """
    params = job.validated_params
    suite: object = params.get("suite")
    names = [str(name) for name in cast("list[object]", suite if isinstance(suite, list) else [])]
    return {name.rpartition(":")[2]: name in BENCHMARKS for name in names}


def _problems(backend: Backend, of: _Sheet) -> list[Problem]:
    """Every model was asked the same, in the same order."""
    problems: dict[int, Problem] = {}
    for column, file in of.files:
        seen: dict[str, int] = {}
        for row in _rows(backend, file):
            model = str(row.get("model") or column)
            place = seen.get(model, 0)
            seen[model] = place + 1
            told = _answered(row)
            if told is not None:
                problem, answers = told
                kept = problems.setdefault(place // max(of.samples, 1), problem)
                kept.answers.setdefault(model, []).extend(answers)
    return [problems[place] for place in sorted(problems)]


def _rows(backend: Backend, file: str) -> Iterator[dict[str, Any]]:
    try:
        with backend.open_file(file) as content:
            yield from islice(objects(content), _MOST_READ)
    except NotFoundError:
        return


def _answered(row: Mapping[str, Any]) -> tuple[Problem, list[Answer]] | None:
    """None for a row that is of neither kind: a job's own code may have written the file."""
    if isinstance(row.get("choices"), list):
        return _chosen(row, [str(choice) for choice in cast("list[object]", row["choices"])])
    if "completion" not in row:
        return None
    given = row["completion"]
    texts = cast("list[object]", given) if isinstance(given, list) else [given]
    told = row.get("messages")
    messages, reference = asked(cast("list[object]", told) if isinstance(told, list) else [])
    expected = row.get("expected")
    score, note = row.get("score"), row.get("note")
    answers = [
        Answer(
            str(text),
            float(score) if isinstance(score, int | float) else None,
            str(note) if note else None,
        )
        for text in texts
    ]
    return Problem(messages, reference if expected is None else str(expected)), answers


def _chosen(row: Mapping[str, Any], choices: Sequence[str]) -> tuple[Problem, list[Answer]] | None:
    """A question, and the choice that the model finds likeliest, with its share."""
    shares, right = row.get("probabilities"), row.get("answer")
    known = cast("list[object]", shares) if isinstance(shares, list) else []
    numbers = [share for share in known if isinstance(share, int | float)]
    if len(numbers) != len(choices) or not numbers or not isinstance(right, int):
        return None
    place = numbers.index(max(numbers))
    listed = "\n".join(f"– {choice}" for choice in choices)
    asked_ = [{"role": "question", "text": f"{row.get('question')}\n{listed}"}]
    answer = Answer(choices[place], float(bool(row.get("correct"))), f"{numbers[place]:.0%}")
    return Problem(asked_, choices[right] if 0 <= right < len(choices) else None), [answer]
