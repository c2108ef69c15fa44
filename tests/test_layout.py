"""The layout can be lived in: no import circles, no crowded folder, and old paths still work."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import openweights

PACKAGE = Path(openweights.__file__).parent
REPOSITORY = PACKAGE.parent
MOST_FILES = 20
MOST_LINES = 600
# Scripts of users, mounted trainers and custom jobs name these.
SPINE = (
    *("validate", "training", "sft", "sdft", "teacher", "divergence", "rollout", "dpo_ft"),
    *("orpo_ft", "grpo_ft", "rewards", "judges", "monitoring", "trainer_args", "callbacks", "data"),
)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


parsed = functools.cache(ast.parse)


def import_graph(package: Path, *, types: bool) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports, at its top or when it runs.

    Args:
        types: Whether imports for annotations alone count, too.
    """
    modules = {module_name(path, package.parent): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        waiting: list[ast.AST] = [parsed(path.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting.extend([*node.orelse, *(node.body if types else [])])
                continue
            named = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.Import):
                graph[name].update(named)
            elif isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{one}" for one in named]
                graph[name].update(f if f in modules else str(node.module) for f in inside)
            waiting.extend(ast.iter_child_nodes(node))
        graph[name] &= modules.keys() - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_circles() -> None:
    graph = import_graph(PACKAGE, types=False)
    assert len(graph) > 100 and circle(graph) == []


def test_no_circles_of_annotations_either_but_of_the_client() -> None:
    """Its collections hold the client that holds them."""
    graph = import_graph(PACKAGE, types=True)
    own = {name for name in graph if f"{name}.".startswith("openweights.client.")}
    rest = {n: found - own for n, found in graph.items() if n not in {*own, "openweights"}}
    assert circle(rest) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("def f():\n    import shop.two\n")
    (package / "two.py").write_text("from shop import three\n")
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shop.one import f\n"
    (package / "three.py").write_text(for_types)
    assert circle(import_graph(package, types=False)) == []
    assert set(circle(import_graph(package, types=True))) == {"shop.one", "shop.two", "shop.three"}
    (package / "three.py").write_text("from shop.one import f\n")
    assert set(circle(import_graph(package, types=False))) == {"shop.one", "shop.two", "shop.three"}


def test_no_folder_is_crowded() -> None:
    files = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    crowded = {
        str(folder.relative_to(PACKAGE)): count
        for folder, count in files.items()
        if count > MOST_FILES
    }
    assert crowded == {}


def test_no_file_is_long() -> None:
    lines = {
        path.relative_to(REPOSITORY): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (PACKAGE, REPOSITORY / "tests", REPOSITORY / "cookbook")
        for path in folder.rglob("*.py")
    }
    assert len(lines) > 400, "the control: files are found"
    assert {str(path): count for path, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize("name", SPINE)
def test_old_paths_of_the_spine_work(name: str) -> None:
    module = import_module(f"openweights.jobs.unsloth.{name}")
    assert module.__file__ == str(PACKAGE / "jobs" / "unsloth" / f"{name}.py")
    assert module.__doc__, "it is no empty shell"


def test_test_files_have_names_of_their_own() -> None:
    """There are no packages in tests/, so pytest knows a test file by its name alone."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
