"""The source bundle: this very package as one deterministic zip, so that a worker runs the code
that the user has.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import openweights

BUNDLE_PURPOSE = "source"
PACKAGE = "openweights"
# Equal for all: the zip depends on names and contents alone.
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16
_SKIPPED_SUFFIXES = frozenset({".pyc", ".pyo", ".so", ".swp"})

Signature = tuple[tuple[str, int, int], ...]


def package_folder() -> Path:
    """Folder of the package that is running."""
    return Path(openweights.__file__).parent


def package_files(folder: Path) -> list[Path]:
    """Files of the package, sorted by name: no caches, nothing hidden."""
    files: list[Path] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part == "__pycache__" or part.startswith(".") for part in parts)
        if not hidden and path.suffix not in _SKIPPED_SUFFIXES and path.is_file():
            files.append(path)
    return files


def signature(folder: Path) -> Signature:
    """Changes whenever a file of the package does."""
    states = ((path, path.stat()) for path in package_files(folder))
    return tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)


def build_bundle(folder: Path | None = None) -> bytes:
    """The package as a zip; equal files give equal bytes."""
    folder = package_folder() if folder is None else folder
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for path in package_files(folder):
            name = f"{PACKAGE}/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(name, date_time=_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = _MODE
            entry.create_system = 3
            bundle.writestr(entry, path.read_bytes())
    return out.getvalue()
