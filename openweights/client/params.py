"""Parameters: as JSON, what they are when nothing is said, and what docstrings say of them.

Scalars of numpy and torch become Python's; what else is no JSON is refused by name.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import ConfigError, InvalidInputError
from openweights.json_values import check_exact

if TYPE_CHECKING:
    from pydantic import BaseModel

_DEEPEST = 100
# A line of a docstring's attributes that begins a field, or several with the same meaning.
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")


def plain(value: object, field: str) -> Any:
    """`value` with each scalar that has `.item()`, also inside lists and dicts, as Python's own.

    Raises:
        ConfigError: It is nested without an end, or holds what no store gives back as it is.
    """
    found = _plain(value, field)
    try:
        check_exact(found, field)
    except InvalidInputError as error:
        raise ConfigError(str(error)) from None
    return found


def _plain(value: object, field: str, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ConfigError(f"{field}: is nested too deeply, or holds itself")
    if type(value) is dict:
        items = cast("dict[object, object]", value).items()
        return {_plain(key, field): _plain(item, field, depth + 1) for key, item in items}
    if type(value) is list:
        return [_plain(item, field, depth + 1) for item in cast("list[object]", value)]
    item = cast("Callable[[], object] | None", getattr(value, "item", None))
    if not callable(item):
        return value
    try:
        return item()
    except (TypeError, ValueError, RuntimeError):
        return value  # of more than one value


def dumped(validated: BaseModel, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """The parameters as JSON.

    Raises:
        ConfigError: A value is no JSON; a line for each such field.
    """
    try:
        return validated.model_dump(mode="json", exclude_defaults=exclude_defaults)
    except ValueError:
        wrong = [line for name in type(validated).model_fields if (line := _wrong(validated, name))]
        raise ConfigError("\n".join(wrong)) from None


def _wrong(validated: BaseModel, name: str) -> str:
    try:
        validated.model_dump(mode="json", include={name})
    except ValueError as error:
        return f"{name}: is not JSON ({error}); use numbers, strings, lists and dicts"
    return ""


@functools.cache
def field_defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model's fields in JSON, as jobs' parameters are stored; fields that must be
    given have none.
    """
    return {
        name: _as_json(field.get_default(call_default_factory=True, validated_data={}))
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value, default=_as_object))


def _as_object(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    return str(value) if dump is None else dump(mode="json")


def field_meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model, and of what it inherits, say of its fields."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        _, _, attributes = inspect.cleandoc(vars(kind).get("__doc__") or "").partition(
            "Attributes:\n"
        )
        names: list[str] = []
        for line in attributes.splitlines():
            entry = _ENTRY.fullmatch(line.removeprefix("    "))
            if entry is not None and not line.startswith("     "):
                names = entry["names"].split(", ")
                found.update(dict.fromkeys(names, entry["text"]))
            elif line.startswith("     "):
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found
