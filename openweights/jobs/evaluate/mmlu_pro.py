"""Worker side of MMLU-Pro: `python -m openweights.jobs.evaluate.mmlu_pro JOB_ID`.

Questions with up to ten choices (Wang et al., 2024, arXiv 2406.01574), each behind worked examples
of its subject from the validation set, answered step by step. The letter of an answer is read as
its authors do: behind "the answer is", else behind "answer:", else the last one that stands alone.

Where we differ: an answer without a letter is wrong; theirs is a letter by chance. Examples and
question are turns of a conversation rather than one text.
"""

from __future__ import annotations

import csv
import logging
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigurationError
from openweights.events import MMLU_PRO, Stage
from openweights.jobs.evaluate import AskedModels
from openweights.jobs.evaluate.run import Scores, evaluate, report
from openweights.jobs.evaluate.tasks import Grade, Row, Task
from openweights.jobs.mmlu_pro import MMLUProConfig
from openweights.jobs.unsloth.rewards import answer_of
from openweights.jobs.unsloth.runtime.job_log import one_line, run_job
from openweights.jobs.unsloth.runtime.launcher import EXIT_TERMINATED

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJ"
_TOLD = (
    "You answer multiple choice questions about {subject}. Think step by step, and end with "
    '"The answer is (X)", where X is the letter of the right choice.'
)
_PATTERNS = (
    re.compile(r"answer is:? *\(?([A-J])\b", re.IGNORECASE),
    re.compile(r"answer: *\(?([A-J])\b", re.IGNORECASE),
    re.compile(r"\b([A-J])\b"),
)


def mmlu_job(job_id: str) -> int:
    """Ask all questions that are not answered yet, and score the answers."""
    from openweights import OpenWeights

    ow = OpenWeights()
    config = MMLUProConfig(**ow.jobs.retrieve(job_id).params["validated_params"])
    ow.run.log(Stage(doing="fetching the questions").data())
    tasks = open_subjects(config)
    asked = AskedModels(
        models=[config.model],
        max_model_len=config.max_model_len,
        chat_template=config.chat_template,
        engine=config.engine,
    )
    scores = evaluate(ow, asked, tasks)
    if scores is None:
        return EXIT_TERMINATED
    together = Task(MMLU_PRO, [row for task in tasks for row in task.rows], _grade)
    scores[config.model, MMLU_PRO] = [
        one for task in tasks for one in scores[config.model, task.name]
    ]
    report(ow, asked, [*tasks, together], scores)
    _write_record(ow, config, scores)
    return 0


def open_subjects(config: MMLUProConfig) -> list[Task]:
    """The questions of each subject.

    Raises:
        ConfigurationError: The dataset cannot be had here.
    """
    test, examples = _load(config.dataset)
    tasks = [
        Task(subject, _rows(config, subject, test, examples), _grade) for subject in config.subjects
    ]
    found = [task for task in tasks if task.rows]
    if not found:
        raise ConfigurationError(f"{config.dataset} has no questions about {config.subjects}")
    return found


def _load(dataset: str) -> tuple[Iterable[Row], Iterable[Row]]:
    from datasets import load_dataset

    try:
        found: Any = load_dataset(dataset)
        return found["test"], found["validation"]
    except Exception as error:  # of many kinds, all with the same meaning
        raise ConfigurationError(
            f"dataset: {dataset} cannot be had here ({one_line(error)}); give a folder with its "
            "test and validation files, or try again with a network"
        ) from error


def _rows(
    config: MMLUProConfig, subject: str, test: Iterable[Row], examples: Iterable[Row]
) -> list[Row]:
    shown = [row for row in examples if row["category"] == subject][: config.ntrain]
    messages = [{"role": "system", "content": _TOLD.format(subject=subject)}]
    for row in shown:
        worked = str(row["cot_content"]).removeprefix("A: ")
        messages += [_turn("user", question_text(row)), _turn("assistant", worked)]
    rows: list[Row] = [
        {
            "id": row["question_id"],
            "messages": [*messages, _turn("user", question_text(row))],
            "max_tokens": config.max_tokens,
            "letter": row["answer"],
        }
        for row in test
        if row["category"] == subject
    ]
    if config.limit is not None and config.limit < len(rows):
        rows = random.Random(0).sample(rows, config.limit)
    return rows


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def question_text(row: Mapping[str, Any]) -> str:
    """A question with its choices, a letter each."""
    choices = [choice for choice in row["options"] if choice != "N/A"]
    listed = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([str(row["question"]).strip(), *listed])


def letter_of(answer: str) -> str | None:
    """The letter that an answer ends up with."""
    text = answer_of(answer)
    for pattern in _PATTERNS:
        if found := pattern.findall(text):
            return str(found[-1]).upper()
    return None


def _grade(rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
    letters = [letter_of(answer) for answer in answers]
    return [
        Grade(float(letter == row["letter"]), f"it says {letter}" if letter else "it gives none")
        for row, letter in zip(rows, letters, strict=True)
    ]


def _write_record(ow: OpenWeights, config: MMLUProConfig, scores: Scores) -> None:
    """The accuracies of all subjects in a line, as the older runner kept them."""
    lines = {task: fmean(own) for (_, task), own in scores.items()}
    save = Path(config.save_dir) / "mmlu_pro_summary.csv"
    for path in (save, *([Path(config.global_record_file)] if config.global_record_file else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            if is_new:
                table.writerow(["model", "ntrain", *lines])
            table.writerow([config.model, config.ntrain, *lines.values()])


if __name__ == "__main__":
    sys.exit(
        run_job(
            sys.argv[1:],
            mmlu_job,
            module="openweights.jobs.evaluate.mmlu_pro",
            failure="the evaluation failed",
        )
    )
