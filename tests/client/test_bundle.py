"""The source bundle is deterministic, complete, and uploaded once for each state of the package."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import openweights
from openweights.client.bundle import build_bundle, package_folder, signature
from tests.client.conftest import QuietClient, every_store  # noqa: F401 - a fixture

PACKAGE = Path(openweights.__file__).parent


def test_equal_packages_give_equal_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "openweights", tmp_path / "two" / "openweights"
    shutil.copytree(PACKAGE, one)
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("__pycache__"))
    for path in two.rglob("*"):
        os.utime(path, (1, 1))
    (one / "client" / "__pycache__").mkdir(exist_ok=True)
    (one / "client" / "__pycache__" / "junk.pyc").write_bytes(b"x")
    (one / ".DS_Store").write_bytes(b"x")
    bundle = build_bundle(one)
    assert bundle == build_bundle(two)
    (two / "errors.py").write_text("changed = 1\n")
    assert bundle != build_bundle(two)
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        names = files.namelist()
    assert names == sorted(names)
    assert "openweights/client/bundle.py" in names and "openweights/backends/base.py" in names
    assert not [name for name in names if "pyc" in name or "/." in name]


def test_unpacked_bundle_works(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as files:
        files.extractall(tmp_path)
    code = "import openweights; print(openweights.__file__, openweights.OpenWeights().jobs.list())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.strip() == f"{tmp_path / 'openweights' / '__init__.py'} []"


def test_uploaded_once(ow: QuietClient) -> None:
    assert package_folder() == PACKAGE
    assert signature(PACKAGE) == signature(PACKAGE)
    first = ow.bundle_file()
    assert first.startswith("source:file-")
    assert ow.bundle_file() == first == QuietClient(settings=ow.settings).bundle_file()
    assert [file["id"] for file in ow.files.list(purpose="source")] == [first]
    assert ow.files.content(first) == build_bundle()


def test_uploaded_again_when_it_is_gone(ow: QuietClient, home: Path) -> None:
    first = ow.bundle_file()
    ow.files.delete(first)
    assert ow.bundle_file() == first
    assert ow.files.content(first) == build_bundle()
    if home.exists():
        shutil.rmtree(home)
        assert ow.bundle_file() == first
        assert ow.files.content(first) == build_bundle()
