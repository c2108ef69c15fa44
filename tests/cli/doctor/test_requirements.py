"""What `ow doctor` compares this installation with."""

from __future__ import annotations

import tomllib
from pathlib import Path

from openweights.cli.doctor import requirements

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert set(requirements.extras()) == {"", *project["optional-dependencies"]}
    train = {item.name: item.versions for item in requirements.needed_by("train")}
    assert train["trl"].startswith("==")
    assert len(train) == len(project["optional-dependencies"]["train"])


def test_an_extra_includes_what_its_extras_need() -> None:
    demo = {item.name for item in requirements.needed_by("demo")}
    assert {"torch", "matplotlib", "gguf"} <= demo
    assert "openweights" not in demo


def test_problems() -> None:
    def problem(name: str, versions: str) -> str | None:
        return requirements.Requirement(name, (), versions, "train").problem()

    assert problem("click", ">=8.1") is None
    assert problem("no-such-package-at-all", "==1") == "is not installed"
    text = problem("click", "==0.1")
    assert text is not None and text.endswith("tested with 0.1")
