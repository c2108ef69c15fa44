"""The packages that this one and its extras ask for, as installed or as `pyproject.toml` says."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?([^;]*)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)")


class Requirement(NamedTuple):
    """A package that is asked for.

    Attributes:
        extras: Extras of that package, as in `openweights[train]`.
        versions: Such as `==1.14.2` or `<3,>=2.11`; empty for any.
        wanted_by: The extra of ours that asks for it; empty for a base dependency.
    """

    name: str
    extras: tuple[str, ...]
    versions: str
    wanted_by: str

    def problem(self) -> str | None:
        """What is wrong with what is installed; ranges are left to pip."""
        try:
            installed = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return "is not installed"
        pinned = self.versions.removeprefix("==")
        if self.versions.startswith("==") and installed.partition("+")[0] != pinned:
            return f"is {installed}, tested with {pinned}"
        return None


def extras() -> list[str]:
    """The extras that ask for something, the base dependencies (the empty name) first."""
    return list(dict.fromkeys(item.wanted_by for item in requirements()))


def needed_by(extra: str) -> list[Requirement]:
    """What an extra needs, with what the extras of ours need that it includes."""

    def walk(name: str) -> Iterator[Requirement]:
        for item in requirements():
            if item.wanted_by == name and item.name == "openweights":
                for included in item.extras:
                    yield from walk(included)
            elif item.wanted_by == name:
                yield item

    return list(dict.fromkeys(walk(extra)))


def requirements() -> list[Requirement]:
    """Everything that this package or one of its extras asks for."""
    try:
        lines = importlib.metadata.requires("openweights") or []
    except importlib.metadata.PackageNotFoundError:
        return _source_requirements()
    extra_of = [_EXTRA.search(line) for line in lines]
    return [
        _parse(line, found[1] if found else "") for line, found in zip(lines, extra_of, strict=True)
    ]


def _source_requirements() -> list[Requirement]:
    """For a source tree that runs without being installed."""
    path = Path(__file__).parents[3] / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    groups: dict[str, list[str]] = {"": project["dependencies"], **project["optional-dependencies"]}
    return [_parse(line, extra) for extra, lines in groups.items() for line in lines]


def _parse(line: str, wanted_by: str) -> Requirement:
    match = _REQUIREMENT.match(line.strip())
    assert match is not None, line
    extras = tuple(part.strip() for part in (match[2] or "").split(",") if part.strip())
    return Requirement(match[1], extras, match[3].strip(), wanted_by)
