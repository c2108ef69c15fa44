"""Paths that others name, kept inside the folder that they are meant for."""

from __future__ import annotations

import posixpath
from pathlib import Path

from openweights.errors import InvalidInputError


def relative(path: str, what: str, folder: object) -> str:
    """The path in its normal form.

    Args:
        what: What it is, for the message: `mount: the target`.
        folder: What it must not leave, for the message.

    Raises:
        InvalidInputError: It is empty, absolute, leads out of the folder, or can be no path.
    """
    # (Not of one with a zero byte: normpath cuts it there, or fails.)
    normal = ".." if "\0" in path else posixpath.normpath(path)
    if normal in (".", "..") or normal.startswith(("/", "../")):
        raise InvalidInputError(f"{what} {path!r} leaves {folder}; use a relative one without '..'")
    return normal


def inside(folder: Path, path: str, what: str) -> Path:
    """`folder / path`, with links followed: also what lies there already may lead elsewhere.

    Raises:
        InvalidInputError: It leaves the folder.
    """
    place = (folder / relative(path, what, folder)).resolve()
    if place == folder.resolve() or not place.is_relative_to(folder.resolve()):
        raise InvalidInputError(f"{what} {path!r} leaves {folder} through a link")
    return place
