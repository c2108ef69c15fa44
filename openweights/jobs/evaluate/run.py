"""Worker side of an evaluation: `python -m openweights.jobs.evaluate.run JOB_ID`."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.client.watching.model_names import model_names
from openweights.client.watching.plot import draw_scores
from openweights.errors import ConfigurationError, JobFailedError
from openweights.events import Evaluation, Stage
from openweights.jobs.evaluate import AskedModels, EvaluateConfig
from openweights.jobs.evaluate.intervals import Estimate, mean_difference, mean_score
from openweights.jobs.evaluate.tasks import Grade, Row, Task, open_tasks
from openweights.jobs.inference.answers import given_answers
from openweights.jobs.inference.config import InferenceConfig
from openweights.jobs.inference.parts import Parts
from openweights.jobs.inference.run import keep_answers
from openweights.jobs.unsloth.runtime.job_log import run_job
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

FOLDER = Path("uploads") / "evaluation"

Scores = dict[tuple[str, str], list[float]]  # (model, task) -> a score for each problem


def evaluate_job(job_id: str) -> int:
    """Ask every model every question that is not answered yet, and score the answers."""
    from openweights import OpenWeights

    ow = OpenWeights()
    config = EvaluateConfig(**ow.jobs.retrieve(job_id).params["validated_params"])
    ow.run.log(Stage(doing="fetching the problems").data())
    tasks = open_tasks(ow, config)
    scores = evaluate(ow, config, tasks)
    if scores is None:
        return EXIT_TERMINATED
    report(ow, config, tasks, scores)
    return 0


def evaluate(ow: OpenWeights, config: AskedModels, tasks: Sequence[Task]) -> Scores | None:
    """The scores of all models, with the answers as files; None when the job was told to stop."""
    rows, places = asked_once(tasks)
    total = len(rows) * len(config.models)
    parts = Parts(ow, ow.run)
    left = [index for index in range(total) if index not in parts.results]
    logger.info("%d answers, %d of them given already", total, total - len(left))
    asked = [asked_of(config, model) for model in config.models]
    answers = given_answers(ow, asked, rows, left, "suite")
    if not keep_answers(answers, parts, ow, total):
        return None
    parts.save()
    ow.run.log(Stage(doing="scoring the answers").data())
    scores: Scores = {}
    for place, model in enumerate(config.models):
        results = [parts.results[place * len(rows) + index] for index in range(len(rows))]
        own = [[results[index] for index in of_task] for of_task in places]
        scores |= _score(model, place, tasks, own)
    return scores


def asked_once(tasks: Sequence[Task]) -> tuple[list[Row], list[list[int]]]:
    """The rows of all tasks, each once however many tasks score its answers, and of each task the
    places of its rows there.
    """
    rows: list[Row] = []
    place_of: dict[str, int] = {}
    places: list[list[int]] = []
    for task in tasks:
        places.append([])
        for row in task.rows:  # which have an id each
            place = place_of.setdefault(json.dumps(row, sort_keys=True, default=str), len(rows))
            places[-1].append(place)
            if place == len(rows):
                rows.append(row)
    return rows, places


def asked_of(config: AskedModels, model: str) -> InferenceConfig:
    """What is asked of one model; the rows say how long their answers may be."""
    return InferenceConfig(
        model=model,
        input_file_id="",
        temperature=config.temperature,
        top_p=config.top_p,
        max_model_len=config.max_model_len,
        n_completions_per_prompt=config.samples,
        chat_template=config.chat_template,
        template_options=config.template_options,
        quantization=config.quantization,
        use_batch=False,
        seed=config.seed,
        engine=config.engine,
    )


# ---- scores --------------------------------------------------------------------------------------


def _score(
    model: str, place: int, tasks: Sequence[Task], results: Sequence[Sequence[Mapping[str, Any]]]
) -> Scores:
    """Of each task the score of each problem; the answers go to its file with theirs, model after
    model.
    """
    found: Scores = {}
    for task, own in zip(tasks, results, strict=True):
        answers = [result["completion"] for result in own]
        several = [[answer] if isinstance(answer, str) else list(answer) for answer in answers]
        grades = _graded(task, several)
        if place == 0:
            (FOLDER / f"{task.name}.jsonl").unlink(missing_ok=True)
        _add_answers(FOLDER / f"{task.name}.jsonl", model, task, several, grades)
        found[model, task.name] = [
            _mean([grade.score for grade in grades_of_row]) for grades_of_row in grades
        ]
    return found


def _graded(task: Task, several: Sequence[Sequence[str]]) -> list[list[Grade]]:
    """A grade for each sample of each row."""
    rows = [row for row, own in zip(task.rows, several, strict=True) for _ in own]
    flat = iter(task.grade(rows, [answer for own in several for answer in own]))
    return [[next(flat) for _ in own] for own in several]


def _mean(scores: Sequence[float]) -> float:
    """Of those that there are."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan


def _add_answers(
    path: Path,
    model: str,
    task: Task,
    several: Sequence[Sequence[str]],
    grades: Sequence[Sequence[Grade]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row, answers, own in zip(task.rows, several, grades, strict=True):
            for answer, grade in zip(answers, own, strict=True):
                score = None if math.isnan(grade.score) else grade.score
                told = {"model": model, "id": row["id"], "score": score, "note": grade.note}
                told |= {"messages": row["messages"], "completion": answer}
                told |= {"expected": expected} if (expected := expected_of(row)) else {}
                file.write(json.dumps(told, ensure_ascii=False) + "\n")


def expected_of(row: Mapping[str, Any]) -> str | None:
    """What a right answer says, where the problem has it: a text, a number, a letter."""
    found = (row.get(name) for name in ("gold_response", "number", "letter"))
    return next((str(one) for one in found if one is not None), None)


def report(ow: OpenWeights, config: AskedModels, tasks: Sequence[Task], scores: Scores) -> None:
    """Log every score, and write the table and its figure.

    Raises:
        JobFailedError: An evaluation could score nothing.
    """
    events = [_event(config, task, model, scores) for task in tasks for model in config.models]
    for event in events:
        ow.run.log(event.data())
        told = Estimate(event.score, event.low, event.high)
        logger.info("%s, %s: %s of %d problems", event.task, event.model, told, event.problems)
    _write_table(events, FOLDER / "scores.csv")
    try:
        names = model_names(ow.backend, config.models)
        draw_scores([event.data() for event in events], FOLDER / "scores.png", names)
    except ConfigurationError as error:
        logger.info("%s", error)
    ow.run.flush()


def _write_table(events: Sequence[Evaluation], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        columns = ("task", "model", "score", "low", "high", "problems", "unscored")
        table.writerow([*columns, "difference", "difference_low", "difference_high"])
        for event in events:
            data = event.data()
            change = event.difference or ["", "", ""]
            table.writerow([*(data.get(column, "") for column in columns), *change])


def _event(config: AskedModels, task: Task, model: str, scores: Scores) -> Evaluation:
    own, first = scores[model, task.name], scores[config.models[0], task.name]
    known = [score for score in own if not math.isnan(score)]
    if not known:
        raise JobFailedError(f"{task.name}: not one answer of {model} could be scored; see the log")
    value, low, high = mean_score(known)
    pairs = [b - a for a, b in zip(first, own, strict=True) if not math.isnan(a + b)]
    change = mean_difference(pairs) if model != config.models[0] and pairs else None
    return Evaluation(
        model=model,
        task=task.name,
        score=value,
        low=low,
        high=high,
        problems=len(known),
        unscored=len(own) - len(known) or None,
        difference=None if change is None else list(change),
    )


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            evaluate_job,
            module="openweights.jobs.evaluate.run",
            failure="the evaluation failed",
        )
    )
