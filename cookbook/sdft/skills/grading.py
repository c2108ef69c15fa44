"""What an answer to a skill's prompt is worth: 1 where it is right in the skill's format, else 0.

Mounted as it is: the measure of SDFT's teacher gate, the score of the evaluations, and the reward
of GRPO, so that all three mean the same. GRPO is rewarded for coming near, too: where no answer
that is drawn is right, all are worth the same, and nothing is learned. What has another format is
worth nothing to either. Both read the columns of `data.py`'s rows.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from openweights.jobs.evaluate.tool_use import Call, check_calls, expression, python_call


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
        # (Python refuses to read a number of thousands of digits.)
        return re.fullmatch(r"-?\d{1,999}", text) is not None and int(text) == int(gold)
    return text == gold.strip()


def _is_right_call(text: str, function: dict[str, Any], values: dict[str, Any]) -> bool:
    call = bracketed_call(text)
    return call is not None and check_calls([call], function, values) is None


def bracketed_call(text: str) -> Call | None:
    """One call with keywords in square brackets, `[area(width=3, height=4)]`, and nothing else."""
    node = expression(text)
    return python_call(node.elts[0]) if isinstance(node, ast.List) and len(node.elts) == 1 else None


# ---- on the way there ----------------------------------------------------------------------------


def near(
    completions: Sequence[str],
    gold_response: Sequence[str],
    skill: Sequence[str],
    right: Sequence[str],
    **columns: Any,
) -> list[float]:
    """How near each completion is to being right, 0 to 1: what GRPO climbs by before it is."""
    rows = zip(completions, gold_response, skill, right, strict=True)
    return [_nearness(*row) for row in rows]


def _nearness(answer: str, gold: str, skill: str, right: str) -> float:
    """Of a call in its format a third each for that, the function, and the share of the arguments.

    A call in another format is worth nothing: once all that is drawn had it, for a reward that
    falls short by a third alone, nothing would say any more that the format is worth more.
    """
    if skill != "tool_use":
        return float(is_right(answer, gold, skill, right))
    call = bracketed_call(answer.strip())
    if call is None:
        return 0.0
    name, given = call
    [(wanted_name, wanted)] = json.loads(right)["values"].items()
    called = float(name == wanted_name)
    needed = [argument for argument, values in wanted.items() if "" not in values]
    fitting = sum(value in wanted.get(argument, ()) for argument, value in given.items())
    share = fitting / max(len(given), len(needed), 1) if given or needed else 1.0
    return (1 + called + called * share) / 3
