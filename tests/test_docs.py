"""The documents name only what there is: files, functions, commands, targets, other documents."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from click import Context, Group

from openweights import events
from openweights.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "cookbook/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"(?:`|^)(?:\.venv/bin/)?ow ([^`\n#|]+)", re.M)
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
    wrong += [told for line in COMMAND.findall(text) for told in wrong_in_command(line)]
    wrong += sorted(set(re.findall(r"\bOPENWEIGHTS_[A-Z_]+\b", text)) - variables())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)
    wrong += [f"make {t}" for t in targets if not re.search(rf"^{t}:", makefile, re.M)]
    return wrong


def wrong_in_command(line: str) -> list[str]:
    """Options that a command does not take, and subcommands that it has not. What stands behind
    `ow exec` and `ow ssh` may be another program's.
    """
    words = re.split(r"\s+", line.strip())
    if not words or words[0] not in COMMANDS or words[0] in ("exec", "ssh"):
        return []
    command = main.get_command(Context(main), words[0])
    if isinstance(command, Group) and len(words) > 1 and words[1].isalpha():
        found = command.get_command(Context(command), words[1])
        if found is None:
            return [f"ow {words[0]} {words[1]}"]
        command = found
    assert command is not None
    known = {name for param in command.params for name in param.opts + param.secondary_opts}
    asked = [
        word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)
    ]
    return [f"ow {words[0]} {word}" for word in asked if word not in {*known, "--help", "-h"}]


@cache
def variables() -> set[str]:
    """Those of our own that some file of the package reads."""
    files = (ROOT / "openweights").rglob("*.py")
    return {
        name for f in files for name in re.findall(r"OPENWEIGHTS_[A-Z_]+", f.read_text("utf-8"))
    }


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
        "`ow ls --nothing` reads OPENWEIGHTS_NOTHING; `ow token forge` makes a key.\n"
        "`openweights/backends/supabase/sql/code/040_workers.sql::nothing`"
    )
    sql = "openweights/backends/supabase/sql/code/040_workers.sql::nothing"
    assert wrong_in(text, ROOT) == [
        *("openweights/errors.py::NoSuchError", "openweights/nothing.py", sql),
        *("none.md", "ow frobnicate", "ow ls --nothing", "ow token forge"),
        *("OPENWEIGHTS_NOTHING", "make tea"),
    ]


def test_the_table_of_commands_names_their_options() -> None:
    """Beside a command its options stand alone, those of `ow exec` and `ow ssh` too."""
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `ow ([a-z-]+)[^|]*?(?:\\\|[^|]*?)*` \| (.*) \|$", text, re.M)
    assert {name for name, _ in rows} == set(COMMANDS)
    for name, told in rows:
        # What is said of another command in its row, such as `ow ls --all`, is checked above.
        own = re.sub(r"`ow [^`]*`", "", told)
        for option in re.findall(r"`(--?[a-z][\w-]*)", own):
            group = main.get_command(Context(main), name)
            commands = group.commands.values() if isinstance(group, Group) else [group]
            taken = {o for one in commands if one for p in one.params for o in p.opts}
            assert option in taken, (name, option)


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
