"""A learning rate from a number or a short arithmetic text, without `eval`.

`"1e-4"`, `"2e-4 / 3"` and `"10 ** -4"` are rates. To the older runner every negative number was an
exponent; here a whole one from -2 down still is one, with a warning (`-4` means `1e-4`), and any
other is refused: `-1e-4` would be a rate of 0.99977.
"""

from __future__ import annotations

import ast
import logging
import math
import operator
from collections.abc import Callable

from openweights.errors import shown
from openweights.number_words import number_words

logger = logging.getLogger(__name__)

MAX_TEXT = 100
MAX_RATE = 1.0
MIN_RATE = 1e-12
HIGHEST_EXPONENT = -2

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def parse_learning_rate(value: object) -> float:
    """The rate that `value` stands for.

    Raises:
        ValueError: It is no rate; the message says what is wrong and what would work.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"is {shown(value)}, not a number; give one such as 1e-4 or '2e-4 / 3'")
    number = _calculate(value) if isinstance(value, str) else _as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"{shown(value)} is not a finite number; give one such as 1e-4")
    rate = number if number >= 0 else _from_exponent(number, value)
    if not MIN_RATE <= rate <= MAX_RATE:
        is_said = value == rate or str(value) == f"{rate:g}"
        meant = "is" if is_said else f"is {number_words(rate, 6)},"
        raise ValueError(
            f"{shown(value)} {meant} outside {number_words(MIN_RATE)} to {MAX_RATE:g}; "
            "give one such as 1e-4"
        )
    return rate


def _from_exponent(exponent: float, value: object) -> float:
    if exponent > HIGHEST_EXPONENT or not exponent.is_integer():
        raise ValueError(f"{shown(value)} is negative; give a rate such as 1e-4")
    rate = 10.0 ** max(exponent, -400.0)
    logger.warning(
        "learning_rate: %s is taken for the exponent of %s; write the rate itself",
        shown(value),
        number_words(rate, 6),
    )
    return rate


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large; give one such as 1e-4") from None


def _calculate(text: str) -> float:
    if len(text) > MAX_TEXT:
        raise ValueError(f"is a text of {len(text)} characters; give at most {MAX_TEXT}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not arithmetic; give one such as '2e-4 / 3'") from None
    try:
        return _as_float(_value_of(tree.body, text))
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero; give one such as 1e-4") from None
    except OverflowError:
        raise ValueError(f"{text!r} is too large; give one such as 1e-4") from None


def _value_of(node: ast.expr, text: str) -> float:
    """Value of one node. Everything is a float, so no power can grow without bound."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _as_float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value_of(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value_of(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value_of(left, text), _value_of(right, text))
            if isinstance(result, complex):
                raise ValueError(f"{text!r} is not a real number; give one such as 1e-4")
            return result
        case ast.BinOp(op=ast.BitXor()):
            raise ValueError(f"{text!r} uses ^; write ** for a power")
    raise ValueError(
        f"{text!r} may hold only numbers, + - * / ** and parentheses; give one such as '2e-4 / 3'"
    )
