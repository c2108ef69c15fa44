"""What an answer to a skill's prompt is worth: 1 where it is right in the skill's format, else 0.

Mounted as it is: the reward of GRPO, the measure of SDFT's teacher gate, and the score of the
evaluations, so that all three mean the same. `score` reads the columns of `data.py`'s rows.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from openweights.jobs.evaluate.tool_use import check_calls


def score(
    completions: Sequence[str],
    gold_response: Sequence[str],
    skill: Sequence[str],
    right: Sequence[str],
    **columns: Any,
) -> list[float]:
    """One number for each completion."""
    rows = zip(completions, gold_response, skill, right, strict=True)
    return [float(is_right(*row)) for row in rows]


def is_right(answer: str, gold: str, skill: str, right: str) -> bool:
    """Whether an answer has the format, and says what is right.

    Args:
        gold: The row's own answer.
        right: JSON: of `tool_use` the function's schema and the values that are right.
    """
    text = answer.strip()
    if skill == "tool_use":
        return _is_right_call(text, **json.loads(right))
    if skill == "arithmetic":
        return re.fullmatch(r"-?\d+", text) is not None and int(text) == int(gold)
    return text == gold.strip()


def _is_right_call(text: str, function: dict[str, Any], values: dict[str, Any]) -> bool:
    """One call with keywords in square brackets, `[area(width=3, height=4)]`, and nothing else."""
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.List) or len(node.elts) != 1:
            return False
        [call] = node.elts
        if not isinstance(call, ast.Call) or call.args:
            return False
        given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return check_calls([(ast.unparse(call.func), given)], function, values) is None
