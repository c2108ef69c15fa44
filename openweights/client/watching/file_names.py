"""Files by the names that they were stored under: ids tell people nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from openweights.errors import NotFoundError

if TYPE_CHECKING:
    from openweights.backends.base import Backend

_FILE = re.compile(r"\b[a-z_]+:file-[0-9a-f]+")
_SCRIPT = "custom_job_file:"


def file_names(backend: Backend, value: object) -> dict[str, str]:
    """Names of the files that a parameter, or all of a job, names by their ids, as far as the
    store has them.
    """
    names: dict[str, str] = {}
    for file_id in _FILE.findall(json.dumps(value, default=str)):
        try:
            name = backend.get_file(file_id).filename
        except NotFoundError:
            continue
        names[file_id] = "".join(c for c in name if c.isprintable())
    return names


def with_names(value: object, names: Mapping[str, str]) -> Any:
    """A parameter as people know it: `animals.jsonl (conversations:file-…)` for a dataset, and
    `short.py:score` for a function in a script.
    """
    if isinstance(value, str):
        return _FILE.sub(lambda found: _named(found[0], names), value)
    if isinstance(value, Mapping):
        given = cast("Mapping[str, object]", value)
        return {with_names(key, names): with_names(one, names) for key, one in given.items()}
    if isinstance(value, Sequence):
        return [with_names(one, names) for one in cast("Sequence[object]", value)]
    return value


def _named(file_id: str, names: Mapping[str, str]) -> str:
    name = names.get(file_id)
    if name is None:
        return file_id
    return name if file_id.startswith(_SCRIPT) else f"{name} ({file_id})"
