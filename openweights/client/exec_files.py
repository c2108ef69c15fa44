"""Which files of a folder `ow exec` takes along: what git would, and never secrets, environments or
caches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

logger = logging.getLogger(__name__)

# `uploads` is where a job leaves its results: what is taken along there would come back as one.
_SKIPPED_FOLDERS = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".ipynb_checkpoints",
        ".tox",
        ".nox",
        "node_modules",
    }
)
_RESULTS = "uploads"

_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]


def collect_files(folder: Path) -> dict[str, Path]:
    """Path below `folder` -> file, for each file to take along.

    Left out: what a `.gitignore` (here, below, or above up to the repository's root) ignores;
    `.git`, `.env*`, virtual environments, caches and a folder `uploads`; links to folders, to what
    is never taken along, and out of the folder.
    """
    folder = folder.resolve()
    files = {
        path.relative_to(folder).as_posix(): path
        for path in _walk(folder, folder, _rules_above(folder))
    }
    return dict(sorted(files.items()))


def _walk(root: Path, folder: Path, rules: _Rules) -> Iterator[Path]:
    rules = (*rules, *_rules_of(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if _takes_folder(root, path) and not _is_ignored(path, rules, is_folder=True):
                yield from _walk(root, path, rules)
        elif not _is_never_taken(entry.name) and not _is_ignored(path, rules, is_folder=False):
            refused = _refusal(root, path) if entry.is_symlink() else None
            if refused:
                logger.warning("%s is left out: it is a link %s", path, refused)
            elif entry.is_file():
                yield path


def _takes_folder(root: Path, path: Path) -> bool:
    if (
        path.name in _SKIPPED_FOLDERS
        or _is_never_taken(path.name)
        or path.name.endswith(".egg-info")
    ):
        return False
    if path.parent == root and path.name == _RESULTS:
        logger.warning("the folder %s is left out: the job keeps its results there", _RESULTS)
        return False
    # What makes a virtual environment one, whatever its name; conda's is the second.
    return not (path / "pyvenv.cfg").exists() and not (path / "conda-meta").exists()


def _is_never_taken(name: str) -> bool:
    """Secrets; and `.git`, which is a file in a work tree or a submodule."""
    return name in (".git", ".netrc") or name.lower().startswith(".env")


def _refusal(root: Path, link: Path) -> str | None:
    """Why a link cannot travel, or None if it can, as a copy of its file."""
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(root):
        return "that leads out of the folder"
    if target.is_dir():
        return "to a folder; use the folder itself, or a copy"
    if any(map(_is_never_taken, target.relative_to(root).parts)):
        return "to what is never taken along"
    return None


def _is_ignored(path: Path, rules: _Rules, *, is_folder: bool) -> bool:
    """As git decides: the last matching pattern of the deepest `.gitignore` that has one."""
    for base, spec in reversed(rules):
        name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _rules_above(folder: Path) -> _Rules:
    """Rules of the folders from the repository's root down to the parent of `folder`; none outside
    a repository.
    """
    above: list[Path] = []
    current = folder
    while not (current / ".git").exists():
        if current.parent == current:
            return ()
        current = current.parent
        above.append(current)
    rules: list[tuple[Path, GitIgnoreSpec]] = []
    exclude = current / ".git" / "info" / "exclude"
    rules.extend(_read_rules(exclude, current))
    for parent in reversed(above):
        rules.extend(_rules_of(parent))
    return tuple(rules)


def _rules_of(folder: Path) -> _Rules:
    return _read_rules(folder / ".gitignore", folder)


def _read_rules(path: Path, base: Path) -> _Rules:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return ((base, GitIgnoreSpec.from_lines(lines)),)
