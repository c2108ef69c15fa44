"""The documents name only what there is: files, functions, commands, targets, other documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from openweights import events
from openweights.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "cookbook/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FOLDERS = "openweights|tests|cookbook|docs"
PATH = re.compile(rf"\b((?:{FOLDERS})/[\w./-]*\w(?:\.\w+|/))(?:::(\w+))?")


def wrong_in(text: str, folder: Path) -> list[str]:
    """What a document that lies in `folder` names and is not there."""
    wrong = []
    for path, name in PATH.findall(text):
        target = ROOT / path
        if not target.exists():
            wrong.append(path)
        elif name and not defines(target, name):
            wrong.append(f"{path}::{name}")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        if not (folder / link).exists():
            wrong.append(link)
    commands = re.findall(r"(?:`|^)(?:\.venv/bin/)?ow ([a-z]+)\b", text, re.M)
    wrong += [f"ow {command}" for command in commands if command not in COMMANDS]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)
    wrong += [f"make {t}" for t in targets if not re.search(rf"^{t}:", makefile, re.M)]
    return wrong


def defines(path: Path, name: str) -> bool:
    """Whether a Python or SQL file has a function, class or constant of that name."""
    text = path.read_text(encoding="utf-8")
    python = rf"^(?:async def|def|class) {name}\b|^{name}\b.*="
    sql = rf"^create or replace function (?:\w+\.)?{name}\("
    return bool(re.search(sql if path.suffix == ".sql" else python, text, re.M))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document: str) -> None:
    path = ROOT / document
    assert wrong_in(path.read_text(encoding="utf-8"), path.parent) == []


def test_what_is_not_there_is_found() -> None:
    text = (
        "See `openweights/errors.py::NoSuchError`, `openweights/nothing.py`, tests/worker/ and "
        "[that](none.md); run `ow frobnicate` or `make tea`. `openweights/errors.py`.\n"
        "`openweights/backends/supabase/sql/code/040_workers.sql::nothing`"
    )
    sql = "openweights/backends/supabase/sql/code/040_workers.sql::nothing"
    assert wrong_in(text, ROOT) == [
        *("openweights/errors.py::NoSuchError", "openweights/nothing.py", sql),
        *("none.md", "ow frobnicate", "make tea"),
    ]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("openweights/jobs/unsloth/divergence.py", "KL(p || q)"),
        ("openweights/backends/supabase/sql/code/040_workers.sql", "skip locked"),
        ("openweights/cluster/planning/planner.py", "def plan("),
        ("openweights/models/templates/template.py", "def render("),
        ("openweights/models/templates/rendering.py", "def rendered_spans("),
        ("openweights/models/templates/comparison.py", "def compared("),
        ("openweights/models/load.py", "get_peft_model"),
        ("openweights/backends/local/lifecycle.py", "def lose_run("),
        ("openweights/backends/supabase/sql/code/020_lifecycle.sql", "lose_run"),
        ("openweights/client/exec_files.py", "_is_never_taken"),
        ("openweights/generation/openai_format.py", "def parse_chat("),
        ("openweights/generation/cuda/scheduler.py", "def admit("),
        ("openweights/events.py", "class TypedEvent"),
    ],
)
def test_a_maintainer_finds_it_in_two_hops(file: str, says: str) -> None:
    """From ARCHITECTURE.md to the file, in the file to the place."""
    assert f"`{file}" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert says in (ROOT / file).read_text(encoding="utf-8")


def test_the_table_of_events_is_complete() -> None:
    document = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", document, re.M))
    kinds = [kind for kind in vars(events).values() if hasattr(kind, "type")]
    assert listed == {kind.__name__: kind.type for kind in kinds}
