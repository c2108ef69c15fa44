"""What is loaded when, and who may import what: the arrows of the package go one way."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import openweights
from tests.benchmarks.startup import BOUNDS_S, COMMANDS, cpu_seconds

PACKAGE = Path(openweights.__file__).parent
REPOSITORY = PACKAGE.parent

HEAVY = (
    *("torch", "transformers", "trl", "peft", "datasets", "unsloth", "supabase", "runpod"),
    *("openai", "starlette", "fastapi", "matplotlib", "pandas", "numpy"),
)
LIGHT = ("pydantic", "httpx", "rich", "click", "sqlite3", "asyncio", "logging", "subprocess")

# Each outside system, and the only files (or folders) that import it.
IMPORTERS = {
    "sqlite3": ("backends/local/",),
    "psycopg": ("backends/supabase/sql/apply.py",),
    "supabase": ("backends/supabase/backend.py",),
    "cryptography": ("backends/supabase/sealing.py",),
    "runpod": ("cluster/pods/runpod.py",),
    "openai": (
        *("client/serving/openai_clients.py", "client/serving/chat.py"),
        *("jobs/inference/openai_models.py", "jobs/unsloth/judges.py"),
    ),
    "starlette": ("dashboard/", "generation/server.py"),
    "uvicorn": ("cli/serve.py", "jobs/api/own_server.py"),
    "fastapi": (),
    "unsloth": ("models/load.py",),
    "vllm": ("generation/vllm_engine.py",),
    "rouge_score": ("jobs/unsloth/rewards.py",),
    "pathspec": ("client/exec_files.py",),
    "dotenv": ("cluster/supervisor.py",),
    "pandas": ("client/watching/tables.py",),
    "matplotlib": ("client/watching/plot.py", "cli/demo/"),
    "click": ("cli/",),
}
# What a part of the package must not import: what stands above it.
_TOP = ("worker", "cluster", "cli", "dashboard")
ABOVE = {
    "types.py": ("settings", "backends", "client", "jobs", "generation", "models", *_TOP),
    "credentials.py": ("settings", "backends", "client", "jobs", "generation", "models", *_TOP),
    "errors.py": ("settings", "backends", "client", "jobs", "generation", "models", *_TOP),
    "settings.py": ("backends", "client", "jobs", "generation", "models", *_TOP),
    "backends/": ("client", "jobs", "generation", "models", *_TOP),
    "client/": ("jobs", "generation", *_TOP),
    "models/": ("backends", "client", "jobs", "generation", *_TOP),
    "generation/": ("backends", "client", "jobs", *_TOP),
    "jobs/": _TOP,
    "worker/": ("jobs", "generation", "models", "cluster", "cli", "dashboard"),
    "cluster/": ("jobs", "generation", "models", "worker", "cli", "dashboard"),
}
# Packages that are imported by another name.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pynacl": "nacl",
    "python_multipart": "multipart",
    "python_dotenv": "dotenv",
}
# `settings.py` reads the environment for these.
ENVIRONMENT_FREE = ("backends/", "client/", "cli/", "cluster/")


def loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules a fresh Python has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
        text=True,
    )
    return answer.stdout.split()


def test_importing_the_package_loads_nothing() -> None:
    assert loaded_after("import openweights", HEAVY + LIGHT) == []
    assert loaded_after("from openweights import JobFailedError", HEAVY + LIGHT) == []
    assert loaded_after("import logging", LIGHT) == ["logging"], "the control"


@pytest.mark.parametrize(
    "code",
    [
        "from openweights import OpenWeights, register, Jobs; OpenWeights()",
        "from openweights import OpenWeights; OpenWeights().fine_tuning",
        "import openweights.jobs.unsloth, openweights.jobs.unsloth.validate",
        "import openweights.jobs.exec",
        "import openweights.jobs.weighted_sft, openweights.jobs.logprob",
        "import openweights.jobs.multiple_choice",
        "import openweights.jobs.inference, openweights.jobs.inference.rows, openweights.jobs.api",
        "import openweights.jobs.evaluate, openweights.jobs.evaluate.sandbox",
        "import openweights.models.names, openweights.models.templates.rendering",
        "import openweights.generation.params, openweights.generation.text",
        "import openweights.worker.main",
        "import openweights.cli",
        "from openweights import OpenWeights; OpenWeights().jobs.list()",
    ],
)
def test_client_side_needs_nothing_heavy(code: str) -> None:
    assert loaded_after(code, HEAVY) == []


def test_public_names() -> None:
    code = "from openweights import *\nassert OpenWeights and Jobs and register and JobFailedError"
    assert loaded_after(code, HEAVY) == []
    assert set(openweights.__all__) <= set(dir(openweights))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = openweights.nonsense


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Modules that a file imports when it runs, at its top or later; not those for types alone."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path


def test_each_outside_system_has_one_importer() -> None:
    wrong: list[str] = []
    seen: set[str] = set()
    for name, path in sources():
        for module in {module.partition(".")[0] for module in imports(path)}:
            seen.add(module)
            if module in IMPORTERS and not name.startswith(IMPORTERS[module] or ("-",)):
                wrong.append(f"{name} imports {module}")
    assert wrong == []
    assert {"sqlite3", "pathspec", "click", "torch"} <= seen, "the control: imports are found"


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name, part in extras.items() for line in part)]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    # triton is part of torch where there is CUDA, pydantic_core of pydantic, tokenizers of
    # transformers, pyarrow of datasets everywhere.
    declared |= {"triton", "pydantic_core", "tokenizers", "pyarrow", *sys.stdlib_module_names}
    declared |= {"openweights", "cookbook", "tests"}
    declared |= {IMPORTED_AS[name] for name in IMPORTED_AS if name in declared}
    beside = [p for name in ("cookbook", "tests") for p in (REPOSITORY / name).rglob("*.py")]
    # Benchmarks compare with packages that nobody else needs, and say which.
    beside = [path for path in beside if path.parent.name != "benchmarks"]
    files = [*sources(), *((path.relative_to(REPOSITORY).as_posix(), path) for path in beside)]
    # A script's neighbours are imported by their own names.
    found = [
        (name, module.partition(".")[0])
        for name, path in files
        for module in imports(path)
        if not path.with_name(f"{module.partition('.')[0]}.py").exists()
    ]
    assert ("cookbook/sdft/bad_medical_advice/eval/questions.py", "yaml") in found, "the control"
    wrong = sorted({f"{name} imports {root}" for name, root in found if root not in declared})
    assert wrong == []


def test_arrows_go_one_way() -> None:
    wrong: list[str] = []
    for name, path in sources():
        below = next((part for part in ABOVE if name.startswith(part)), None)
        for module in imports(path) if below else ():
            root, _, rest = module.partition(".")
            if below and root == "openweights" and rest.partition(".")[0] in ABOVE[below]:
                wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_settings_alone_reads_the_environment() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in sources()
        if name.startswith(ENVIRONMENT_FREE) and not name.startswith("cli/demo/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    ]
    assert wrong == []


@pytest.mark.parametrize("name", BOUNDS_S)
def test_start_is_quick(name: str) -> None:
    # The least of several: other processes on a busy machine only ever add to it.
    assert min(cpu_seconds(COMMANDS[name], runs=5)) < BOUNDS_S[name]
