"""Whether an answer calls the right function with the right arguments.

Problems are those of the Berkeley Function Calling Leaderboard (version 4, `simple_python`): a
question, the schema of one function, and for each argument the values that are right; an empty text
among them says that it may be left out. Values are compared as their authors do: texts without
regard to case, spaces and `,./-_*^`; whole numbers count where a float is asked for; a type other
than the schema's is wrong.

Where we differ: the call is asked for as JSON by our own words, and read wherever it stands in the
answer, as JSON or as Python, rather than by a reader for each family of models.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from openweights.errors import shown

ASK = (
    "You can call a function. Answer with the call alone, as one JSON object: "
    '{{"name": "<name of the function>", "arguments": {{"<parameter>": <value>}}}}. Leave out '
    "parameters that the question says nothing about and that are not required.\n\n"
    "The function:\n{function}"
)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_LIGHT = re.compile(r"[ ,./\-_*^]")

Call = tuple[str, dict[str, Any]]


def system_prompt(function: Mapping[str, Any]) -> str:
    """What the model is told about the function."""
    return ASK.format(function=json.dumps(function, ensure_ascii=False))


# ---- reading -------------------------------------------------------------------------------------


def calls_in(answer: str) -> list[Call]:
    """The calls that an answer makes, in its order: those in JSON, else those in Python."""
    return list(_json_calls(answer)) or list(_python_calls(answer))


def _json_calls(answer: str) -> Iterator[Call]:
    decoder, place = json.JSONDecoder(), 0
    while (place := answer.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(answer, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        call = _as_call(value)
        if call is not None:
            yield call
        # What holds no call may hold one inside, as a list of OpenAI's `tool_calls` does.
        place = end if call is not None else place + 1


def _as_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get("arguments", value.get("parameters"))
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    return (value["name"], given) if isinstance(given, dict) else None


def _python_calls(answer: str) -> Iterator[Call]:
    for text in (answer.strip(), *re.findall(r"```(?:\w+)?\n(.*?)```", answer, re.DOTALL)):
        tree = expression(text.strip())
        nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        found = [call for node in nodes if (call := python_call(node)) is not None]
        if found:
            yield from found
            return


def expression(text: str) -> ast.expr | None:
    """A text as an expression of Python; None for one that is none."""
    tree = python_tree(text, "eval")
    return tree.body if isinstance(tree, ast.Expression) else None


def python_tree(text: str, mode: Literal["exec", "eval"] = "exec") -> ast.AST | None:
    """A text that a model has written, as Python; None where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes and the like: nobody here has written them
        try:
            return ast.parse(text, mode=mode)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def python_call(node: ast.expr | None) -> Call | None:
    """A call whose arguments are keywords with plain values; None for any other expression."""
    if not isinstance(node, ast.Call) or node.args:
        return None
    try:
        given = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
        return ast.unparse(node.func), given
    except (ValueError, TypeError, RecursionError):  # the second of a set that holds lists
        return None


# ---- checking ------------------------------------------------------------------------------------


def check_calls(
    calls: Sequence[Call], function: Mapping[str, Any], right: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """What is wrong with an answer's calls; None when they are right.

    Args:
        function: Its schema.
        right: Its name -> argument -> the values that are right.
    """
    if len(calls) != 1:
        return f"it makes {len(calls) or 'no'} calls, not one"
    try:
        return _check_call(*calls[0], function, right)
    except (RecursionError, ValueError):  # of a number that is too long to be written the second
        return "what it calls cannot be compared"


def _check_call(
    name: str,
    given: Mapping[str, Any],
    function: Mapping[str, Any],
    right: Mapping[str, Mapping[str, Any]],
) -> str | None:
    wanted = right[function["name"]]
    if name != function["name"]:
        return f"it calls {name!r}"
    properties = function["parameters"]["properties"]
    for argument in function["parameters"].get("required", ()):
        if argument not in given:
            return f"{argument} is missing"
    for argument, value in given.items():
        if argument not in properties or argument not in wanted:
            return f"{argument} is no parameter"
        if not _has_type(value, properties[argument], wanted[argument]):
            return f"{argument} has type {type(value).__name__}"
        if not _is_among(value, wanted[argument]):
            return f"{argument} is {shown(value)}"
    missing = [a for a, values in wanted.items() if a not in given and "" not in values]
    return f"{missing[0]} is missing" if missing else None


def _has_type(value: Any, schema: Mapping[str, Any], allowed: Sequence[Any]) -> bool:
    """As the schema says, or as the right values are: those may name a variable."""
    wanted = schema["type"]
    if wanted == "float" and type(value) is int:
        return True
    if wanted == "tuple" and isinstance(value, tuple):
        value = list(value)
    if type(value) is _TYPES[wanted]:
        inner = schema.get("items", {}).get("type")
        return not isinstance(value, list) or inner is None or _have_type(value, inner)
    return any(type(value) is type(one) for one in allowed if one != "")


def _have_type(values: Sequence[Any], inner: str) -> bool:
    kind = _TYPES[inner]
    return all(type(one) is kind or (inner == "float" and type(one) is int) for one in values)


def _is_among(value: Any, allowed: Sequence[Any]) -> bool:
    if isinstance(value, dict):
        return any(_dict_fits(value, one) for one in allowed if isinstance(one, dict))
    if isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        lists = [one for one in allowed if isinstance(one, list) and len(one) == len(value)]
        return any(
            all(isinstance(part, dict) and _dict_fits(part, own) for part, own in pairs)
            for pairs in (list(zip(value, one, strict=True)) for one in lists)
        )
    return any(_light(value) == _light(one) for one in allowed)


def _dict_fits(given: Mapping[str, Any], allowed: Mapping[str, Any]) -> bool:
    """Each key with one of its values, and none missing that may not be."""
    fits = all(key in allowed and _is_among(value, allowed[key]) for key, value in given.items())
    return fits and all(key in given or "" in values for key, values in allowed.items())


def _light(value: Any) -> Any:
    """A text without what its authors disregard; of a list each of its own."""
    if isinstance(value, str):
        return _LIGHT.sub("", value).lower().replace("'", '"')
    return [_light(part) for part in value] if isinstance(value, list | tuple) else value
