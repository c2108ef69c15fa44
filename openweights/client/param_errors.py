"""pydantic's errors in our words: a line for each parameter that says what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_SHOWN = 60  # characters of a wrong value
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "string": "a string",
    "dict": "a dict",
    "list": "a list",
    "tuple": "a tuple",
    "model": "a dict",
}


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each wrong field of `model`: field, what is wrong, what would work."""
    lines = [_line(detail, model) for detail in error.errors(include_url=False)]
    return list(dict.fromkeys(lines))


def ignored_params(params: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    """A line for each parameter that pydantic's default is to ignore: it is mostly a slip."""
    if model.model_config.get("extra", "ignore") != "ignore" or not _takes_names(model):
        return []
    unknown = [name for name in params if name not in model.model_fields]
    return [f"{name}: {_unknown((name,), model)}" for name in unknown]


def spelled(values: Iterable[object]) -> str:
    """`'a', 'b' or 'c'`."""
    names = [repr(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def _takes_names(model: type[BaseModel]) -> bool:
    """Whether its parameters go by the names of its fields alone."""
    fields = model.model_fields.values()
    return all(field.alias is None and field.validation_alias is None for field in fields)


def _line(detail: ErrorDetails, model: type[BaseModel]) -> str:
    field = _field(detail["loc"])
    return f"{field}: {_what(detail, model)}" if field else _what(detail, model)


def _field(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _what(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind = detail["type"]
    context: Mapping[str, Any] = detail.get("ctx") or {}
    given = _shown(detail["input"])
    if kind == "missing":
        return "is required; pass it"
    if kind == "extra_forbidden":
        return _unknown(detail["loc"], model)
    if kind == "literal_error" or kind == "enum":
        return f"must be {context['expected']}, not {given}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]}, not {given}"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    wanted = _TYPES.get(kind.split("_")[0])
    if wanted is not None and kind.endswith(("_type", "_parsing", "_from_float")):
        return f"must be {wanted}, not {given}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]} (got {given})"


def _unknown(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = list(model.model_fields)
    meant = closest(str(loc[-1]), known) if len(loc) == 1 else None
    if meant is not None:
        return f"is not a parameter; did you mean {meant!r}?"
    listed = f"; there are {', '.join(known)}" if len(loc) == 1 and len(known) <= 12 else ""  # noqa: PLR2004
    return f"is not a parameter{listed or '; leave it out'}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
