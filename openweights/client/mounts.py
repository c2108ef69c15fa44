"""Which local files a job takes along, and where they land in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from openweights.errors import InvalidInputError
from openweights.paths import relative

_TARGET = ("mount: the target", "the job's folder")


def expand_mounts(mount: Mapping[str, str]) -> dict[str, Path]:
    """Target -> local file for each file of each mounted file or folder.

    Args:
        mount: Local path (relative to the current folder) -> target inside the job's folder.

    Raises:
        InvalidInputError: A path is not there, a folder is empty, a target leaves the job's folder,
            or two files share one.
    """
    files: dict[str, Path] = {}
    for local, target in mount.items():
        path = Path(local).expanduser()
        # Of a folder the target may be the job's folder itself.
        for below, file in _files_at(path):
            place = relative(str(PurePosixPath(target) / below) if below else target, *_TARGET)
            if place in files:
                raise InvalidInputError(
                    f"mount: {files[place]} and {file} both go to {place!r}; use two targets"
                )
            _check_place(place)
            files[place] = file
    for place in files:
        for folder in PurePosixPath(place).parents:
            if str(folder) in files:
                raise InvalidInputError(
                    f"mount: {str(folder)!r} is the target of a file, and {place!r} lies below it; "
                    "use two targets"
                )
    return files


def _check_place(place: str) -> None:
    """The job's own folders: what it leaves there are its results, or its events."""
    if place == "uploads" or place.split("/")[0] == ".spool":
        raise InvalidInputError(
            f"mount: the target {place!r} is where the job keeps what it makes; use another one"
        )


def _files_at(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield "", path
        return
    if not path.is_dir():
        raise InvalidInputError(
            f"mount: there is no file or folder {str(path)!r} (looked at {path.absolute()}); "
            "relative paths start at the current folder"
        )
    from openweights.client.exec_files import collect_files

    files = collect_files(path, is_named=True)
    if not files:
        raise InvalidInputError(f"mount: the folder {str(path)!r} holds no files to take along")
    yield from ((below, path / below) for below in files)
