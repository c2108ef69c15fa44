"""Files by the names that they were stored under: ids tell people nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import NotFoundError

if TYPE_CHECKING:
    from openweights.backends.base import Backend

FILE_ID = re.compile(r"\b[a-z_]+:file-[0-9a-f]+")
_SCRIPT = "custom_job_file:"


def file_names(backend: Backend, value: object) -> dict[str, str]:
    """Names of the files that a parameter, or all of a job, names by their ids, as far as the
    store has them. Scripts of one name have their ids, too: they are not the same.
    """
    names: dict[str, str] = {}
    for file_id in FILE_ID.findall(json.dumps(value, default=str)):
        try:
            name = backend.get_file(file_id).filename
        except NotFoundError:
            continue
        names[file_id] = "".join(c for c in name if c.isprintable())
    scripts = Counter(name for file_id, name in names.items() if file_id.startswith(_SCRIPT))
    return {
        file_id: f"{name} ({file_id.removeprefix(_SCRIPT)})"
        if file_id.startswith(_SCRIPT) and scripts[name] > 1
        else name
        for file_id, name in names.items()
    }


def short_file_names(backend: Backend, value: object) -> dict[str, str]:
    """As `file_names`, for where there is little room: an id only where several have a name."""
    names = file_names(backend, value)
    several = Counter(names.values())
    return {id: name if several[name] == 1 else _named(id, names) for id, name in names.items()}


def with_names(value: object, names: Mapping[str, str]) -> Any:
    """A parameter as people know it: `animals.jsonl (conversations:file-…)` for a dataset, and
    `short.py:score` for a function in a script.
    """
    return replaced(value, lambda text: FILE_ID.sub(lambda found: _named(found[0], names), text))


def replaced(value: object, change: Callable[[str], str]) -> Any:
    """A parameter with each of its texts, those of keys too, as `change` makes it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        given = cast("Mapping[str, object]", value)
        return {replaced(key, change): replaced(one, change) for key, one in given.items()}
    if isinstance(value, Sequence):
        return [replaced(one, change) for one in cast("Sequence[object]", value)]
    return value


def keys_with_names(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Any]:
    """Rows whose columns alone are called as people know their files."""
    return [{with_names(key, names): value for key, value in row.items()} for row in rows]


def _named(file_id: str, names: Mapping[str, str]) -> str:
    name = names.get(file_id)
    if name is None:
        return file_id
    return name if file_id.startswith(_SCRIPT) else f"{name} ({file_id})"
