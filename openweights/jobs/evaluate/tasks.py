"""The evaluations of a suite: their problems as rows to answer, and what an answer is worth."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openweights.jobs.evaluate import EvaluateConfig, measure
from openweights.jobs.evaluate.data import (
    BFCL_ANSWERS,
    BFCL_QUESTIONS,
    GSM8K,
    HUMANEVAL,
    read_package,
)
from openweights.jobs.evaluate.sandbox import run_programs
from openweights.jobs.evaluate.tool_use import calls_in, check_calls, python_tree, system_prompt
from openweights.jobs.unsloth.config.grpo_fields import JUDGES, RewardChoice, split_gold
from openweights.jobs.unsloth.config.rows import read_rows
from openweights.jobs.unsloth.rewards import Reward, Samples, answer_of, text_reward

if TYPE_CHECKING:
    from openweights import OpenWeights

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

JUDGED_AT_ONCE = 64  # answers that a judge grades before its deadline


class Grade(NamedTuple):
    """What an answer is worth.

    Attributes:
        score: From 0 to 1; NaN where it could not be scored.
        note: What is wrong with it, where that is known.
    """

    score: float
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """An evaluation.

    Attributes:
        rows: Problems: `id`, `messages`, `max_tokens`, and what grading needs.
        grade: Of rows and their answers a grade each.
    """

    name: str
    rows: Sequence[Row]
    grade: Callable[[Sequence[Row], Sequence[str]], list[Grade]]


def open_tasks(ow: OpenWeights, config: EvaluateConfig) -> list[Task]:
    """The evaluations of a job, with the problems that it asks for.

    Raises:
        ConfigurationError: The problems cannot be had here, or a judge's key is missing.
    """
    return [_limited(_open(ow, config, name), config) for name in config.suite]


def _open(ow: OpenWeights, config: EvaluateConfig, name: str) -> Task:
    choice = measure(name)
    if choice is not None:
        return _own(ow, config, choice)
    return {"humaneval": humaneval, "gsm8k": gsm8k, "tool_use": tool_use}[name]()


def _limited(task: Task, config: EvaluateConfig) -> Task:
    """With `limit` problems, which do not depend on what else is in the suite."""
    rows = list(task.rows)
    if config.limit is not None and config.limit < len(rows):
        chosen = random.Random(config.seed).sample(range(len(rows)), config.limit)
        rows = [rows[index] for index in sorted(chosen)]
    if config.max_tokens is not None:
        rows = [{**row, "max_tokens": config.max_tokens} for row in rows]
    return replace(task, rows=rows)


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- humaneval: programs (Chen et al., 2021) -----------------------------------------------------

_COMPLETE = (
    "Complete this Python function. Answer with the whole function in a code block.\n\n"
    "```python\n{prompt}```"
)
_CODE_BLOCK = re.compile(r"```(?:\w+)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def humaneval() -> Task:
    """The 164 functions of HumanEval; an answer passes when its checks do."""
    [problems] = read_package(HUMANEVAL)
    rows = [
        {
            "id": problem["task_id"],
            "messages": _asked(_COMPLETE.format(prompt=problem["prompt"])),
            "max_tokens": 512,
            "problem": problem,
        }
        for problem in problems
    ]
    return Task("humaneval", rows, _run_answers)


def _run_answers(rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
    programs = [program(row["problem"], one) for row, one in zip(rows, answers, strict=True)]
    outcomes = run_programs(programs)
    return [Grade(float(outcome.passed), outcome.error) for outcome in outcomes]


def program(problem: Mapping[str, str], answer: str) -> str:
    """The answer's function behind what the prompt has before it, and the problem's checks.

    An answer that only goes on with the function, as a base model's does, is put behind its head,
    as far as it is indented.
    """
    text = answer_of(answer)
    name, prompt = problem["entry_point"], problem["prompt"]
    head = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    blocks = _CODE_BLOCK.findall(text)
    whole = [block for block in blocks if head.search(block)]
    if not whole and head.search(text) and python_tree(text):
        whole = [text]
    if whole:
        before = prompt[: [found.start() for found in head.finditer(prompt)][-1]]
        code = f"{before}\n{whole[0]}"
    else:
        code = prompt + _indented(blocks[0] if blocks else text)
    return f"{code}\n{problem['test']}\ncheck({name})\n"


def _indented(text: str) -> str:
    """The lines before the first that is not indented: those of a function's body."""
    lines = text.splitlines()
    ends = (i for i, line in enumerate(lines) if line.strip() and not line[0].isspace())
    return "\n".join(lines[: next(ends, len(lines))])


# ---- gsm8k: numbers (Cobbe et al., 2021) ---------------------------------------------------------

_REASON = "{question}\n\nThink step by step, and end with a line `#### <number>`."
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def gsm8k() -> Task:
    """A hundred questions of GSM8K's test set; the last number of an answer counts."""
    [problems] = read_package(GSM8K)
    rows = [
        {
            "id": problem["id"],
            "messages": _asked(_REASON.format(question=problem["prompt"])),
            "max_tokens": 512,
            "number": problem["expected"],
        }
        for problem in problems
    ]
    return Task("gsm8k", rows, _check_numbers)


def _check_numbers(rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
    return [check_number(answer, row["number"]) for row, answer in zip(rows, answers, strict=True)]


def check_number(answer: str, right: str) -> Grade:
    """Whether an answer ends with the right number: the one behind the last `####`, else in the
    last `\\boxed{}`, else the last one of all.
    """
    text = answer_of(answer)
    marked = re.findall(r"####\s*([^\n]*)", text) or re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = _NUMBER.findall(marked[-1])[:1] if marked else _NUMBER.findall(text)[-1:]
    if not numbers:
        return Grade(0.0, "it gives no number")
    said = _value(numbers[0])
    return Grade(1.0) if said == _value(right) else Grade(0.0, f"it says {numbers[0]}")


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))


# ---- tool_use: calls of functions ----------------------------------------------------------------


def tool_use() -> Task:
    """The 400 questions of BFCL's `simple_python`; an answer is to call the function right."""
    questions, answers = read_package(BFCL_QUESTIONS, BFCL_ANSWERS)
    right = {answer["id"]: answer["ground_truth"][0] for answer in answers}
    rows = [_tool_row(question, right[question["id"]]) for question in questions]
    return Task("tool_use", rows, _check_calls)


def _tool_row(question: Mapping[str, Any], right: Mapping[str, Any]) -> Row:
    [function], [messages] = question["function"], question["question"]
    told = {"role": "system", "content": system_prompt(function)}
    return {
        "id": question["id"],
        "messages": [told, *messages],
        "max_tokens": 256,
        "function": function,
        "right": right,
    }


def _check_calls(rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
    wrong = [
        check_calls(calls_in(answer_of(answer)), row["function"], row["right"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    return [Grade(float(what is None), what) for what in wrong]


# ---- answers to rows of one's own ----------------------------------------------------------------


def _own(ow: OpenWeights, config: EvaluateConfig, choice: RewardChoice) -> Task:
    assert config.prompts is not None
    rows: list[Row] = []
    for number, row in enumerate(read_rows(ow.files.download(config.prompts, _DATA / "prompts"))):
        messages, gold = split_gold(row)
        asked = {"id": number, **row, "messages": messages, "gold_response": gold}
        rows.append({"max_tokens": 600, **asked})
    reward = _reward(ow, config, choice)

    def grade(rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
        return _rewarded(reward, rows, answers)

    return Task(choice.name, rows, grade)


_DATA = Path("data")


def _reward(ow: OpenWeights, config: EvaluateConfig, choice: RewardChoice) -> Reward:
    if choice.file is not None:
        from openweights.jobs.unsloth.grpo.reward_functions import own_reward

        path = ow.files.download(choice.file, _DATA / f"{choice.name}.py")
        return own_reward(path, choice.name, 1.0, field="suite")
    if choice.name in JUDGES:
        from openweights.jobs.unsloth.grpo.judge_parsing import JudgeLimits
        from openweights.jobs.unsloth.judges import Judge

        return Judge(choice.name, config.judge, JudgeLimits()).reward(1.0)  # type: ignore[arg-type]
    return text_reward(choice.name, 1.0)


def _rewarded(reward: Reward, rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
    """Some at a time: a judge has a deadline for each call."""
    from openweights.jobs.unsloth.grpo.judge_parsing import JudgeLimits
    from openweights.jobs.unsloth.grpo.reward_functions import RewardFunctions

    functions = RewardFunctions([reward], limit_s=2 * JudgeLimits().total_s)
    grades: list[Grade] = []
    for start in range(0, len(rows), JUDGED_AT_ONCE):
        part = list(rows[start : start + JUDGED_AT_ONCE])
        said = list(answers[start : start + JUDGED_AT_ONCE])
        samples = Samples([row["messages"] for row in part], said, [[] for _ in part], part)
        [values] = functions.score(samples)
        for cause, count in reward.causes.items():
            logger.warning("%s: %d answers are not scored: %s", reward.name, count, cause)
        grades += [Grade(v, "not scored" if math.isnan(v) else None) for v in values]
    return grades
