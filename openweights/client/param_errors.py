"""pydantic's errors in our words: a line for each parameter, with what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails
from openweights.errors import closest, shown

# What a job kind says of a name that the model does not have, or None for the general words.
Unknown = Callable[[str, "type[BaseModel]"], str | None]

_LISTED = 12  # so many names of parameters fit into a message
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
    "datetime": "a moment",
    "tuple": "a tuple",
    "model": "a dict",
}
# Branches of a union, which pydantic puts into the location of an error.
_BRANCHES = frozenset(
    {"bool", "constrained-float", "constrained-int", "datetime", "float", "int", "str"}
)


def describe_validation_error(
    error: ValidationError, model: type[BaseModel], *, unknown: Unknown | None = None
) -> list[str]:
    """One line for each wrong field of `model`: field, what is wrong, what would work.

    A check of several fields may raise a `PydanticCustomError` whose context has `problems`: by
    field what is wrong.
    """
    found: dict[str, list[ErrorDetails]] = {}
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        if "problems" in detail.get("ctx", {}):
            lines.update(detail.get("ctx", {})["problems"])
        else:
            found.setdefault(_field(_place(detail)), []).append(detail)
    # The branches of a union all complain of the same value.
    lines = {field: _what(details, model, unknown) for field, details in found.items()} | lines
    return [f"{field}: {what}" if field else what for field, what in lines.items()]


def ignored_params(params: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    """A line for each parameter that pydantic's default is to ignore: it is mostly a slip."""
    if model.model_config.get("extra", "ignore") != "ignore" or not _takes_names(model):
        return []
    names = [name for name in params if name not in model.model_fields]
    return [f"{name}: {_unknown((name,), model)}" for name in names]


def _takes_names(model: type[BaseModel]) -> bool:
    """Whether its parameters go by the names of its fields alone."""
    fields = model.model_fields.values()
    return all(field.alias is None and field.validation_alias is None for field in fields)


def _place(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Where the error is, without the branches of unions."""
    first, *rest = detail["loc"] or ("",)
    return first, *(p for p in rest if isinstance(p, int) or not ("[" in p or p in _BRANCHES))


def _field(place: tuple[int | str, ...]) -> str:
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _what(
    details: Sequence[ErrorDetails], model: type[BaseModel], unknown: Unknown | None = None
) -> str:
    detail = details[0]
    if detail["type"] == "missing":
        return f"is required; pass {_choices(_place(detail), model) or 'it'}"
    if detail["type"] == "extra_forbidden":
        return _unknown(_place(detail), model, unknown)
    wanted = [_wanted(detail) for detail in details]
    if None not in wanted:
        words = " or ".join(dict.fromkeys(str(words) for words in wanted))
        return f"must be {words}, not {shown(detail['input'])}{_remedy(_place(detail), model)}"
    if detail["type"] == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]} (got {shown(detail['input'])})"


def _wanted(detail: ErrorDetails) -> str | None:
    """What the value must be, where a few words say it."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {context[key]}"
    if kind == "finite_number":
        return "a finite number"
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return _TYPES.get(kind.split("_")[0])
    return None


def _choices(place: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The values that a field may have, where they are named; empty otherwise."""
    owner = _owner(place, model)
    field = None if owner is None else owner.model_fields.get(str(place[-1]))
    named = field is not None and get_origin(field.annotation) is Literal
    return " or ".join(map(repr, get_args(field.annotation))) if field and named else ""


def _remedy(place: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """What to do about a wrong value, where there is more to say than what it must be."""
    owner = _owner(place, model)
    field = None if owner is None else owner.model_fields.get(str(place[-1]))
    if field is None or field.is_required():
        return ""
    default = field.get_default(call_default_factory=True, validated_data={})
    return f"; correct it, or remove it for the default {shown(default)}"


def _unknown(
    place: tuple[int | str, ...], model: type[BaseModel], unknown: Unknown | None = None
) -> str:
    name, owner = str(place[-1]), _owner(place, model)
    if owner is None:
        return "is not a parameter; leave it out"
    if unknown is not None and (said := unknown(name, owner)):
        return said
    known = list(owner.model_fields)
    if meant := closest(name, known):
        return f"is not a parameter; did you mean {meant!r}?"
    if len(known) == 1:
        return f"is not a parameter; there is only {known[0]}"
    if len(known) <= _LISTED:
        return f"is not a parameter; there are {', '.join(known)}"
    return "is not a parameter; leave it out"


def _owner(place: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """The model, `model` or one inside it, that has or lacks the last name of `place`."""
    owner: type[BaseModel] | None = model
    for part in place[:-1]:
        if isinstance(part, str):
            field = owner.model_fields.get(part) if owner is not None else None
            owner = None if field is None else _inner_model(field.annotation)
    return owner


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_inner_model, get_args(annotation))), None)
